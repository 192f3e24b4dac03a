// The kernels' bodies, included once for each instruction set (instruction_set.cpp): inside its
// namespace, after the definitions of Vec and of these sizes:
//
//   kRows, kPanels  a tile of a matrix product, rows x panels, whose sums fit the registers: even
//                   and odd sums of fused multiply-adds
//   kDotRows, kDotRowsOnePass, kDotPanels  the same of dot products, of 16-bit and of 8-bit codes
//   kPanelsOneRow   more panels for one row, so that enough sums are computed at a time
//   kPanelGroup     panels whose weights stay in the cache for all rows
//   kScoreChains    query rows x tiles of keys computed at a time
//   kValueRows      query rows that share a load of the values

#include "cpu/kernels/math.h"
//
#include "cpu/kernels/attention.h"
#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/sampling.h"
//
#include "cpu/kernels/linear.h"
//
#include "cpu/kernels/scale_search.h"

inline const Kernels& table(const char* isa) {
  static const Kernels kernels = {isa,        input_stride,  prepare_input, linear,      norm,
                                  add_to,     scale_numbers, add_scaled_to, activate,    attend,
                                  merge,      bin_weights,   take_bin,      exp_weights, exp_sum,
                                  gumbel,     noisy_best,    xtc_word,      log_one,     max_value,
                                  all_finite, search_scales};
  return kernels;
}
