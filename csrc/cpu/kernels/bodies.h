// The kernels' bodies, to be included once in each instruction set's translation unit: inside a
// namespace of its own, behind the definition of Vec and of the tile sizes.

#include "cpu/kernels/math.h"
//
#include "cpu/kernels/attention.h"
#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/linear.h"
#include "cpu/kernels/sampling.h"

inline const Kernels& table(const char* isa) {
  static const Kernels kernels = {isa,      linear,  round_bf16, norm,        add_to,
                                  activate, attend,  merge,      exp_weights, exp_sum,
                                  gumbel,   log_one, max_value,  all_finite};
  return kernels;
}
