// The kernels' bodies, to be included once in each instruction set's translation unit: inside a
// namespace of its own, behind the definition of Vec and of the tile sizes.

#include "cpu/kernels/math.h"
//
#include "cpu/kernels/attention.h"
#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/sampling.h"
//
#include "cpu/kernels/linear.h"

inline const Kernels& table(const char* isa) {
  static const Kernels kernels = {isa,     input_stride, prepare_input, linear,    norm,
                                  add_to,  activate,     attend,        merge,     exp_weights,
                                  exp_sum, gumbel,       log_one,       max_value, all_finite};
  return kernels;
}
