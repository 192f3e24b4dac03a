// Activations: of the op (elementwise.cu), and of the product that activates what it makes
// (multiply_few.cuh).
#pragma once

#include <cmath>

#include "core/spec.h"
#include "cuda/device/primitives.cuh"

namespace octavo::cuda {

// x / (1 + e^-x), with e only of what is not positive, so that nothing overflows.
OCTAVO_DEVICE float silu(float x) {
  const float t = fast_exp(-fabsf(x));
  return (x < 0.0f ? x * t : x) / (1.0f + t);
}

template <Activation activation>
OCTAVO_DEVICE float activate(float x) {
  if constexpr (activation == Activation::silu) {
    return silu(x);
  } else if constexpr (activation == Activation::gelu) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  } else if constexpr (activation == Activation::gelu_tanh) {
    const float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(inner));
  } else {
    return x > 0.0f ? x : 0.0f;
  }
}

template <Activation activation>
OCTAVO_DEVICE float4 activate(float4 x) {
  return {activate<activation>(x.x), activate<activation>(x.y), activate<activation>(x.z),
          activate<activation>(x.w)};
}

// The same where the activation is not known before the kernel runs.
OCTAVO_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu:
      return activate<Activation::gelu>(x);
    case Activation::gelu_tanh:
      return activate<Activation::gelu_tanh>(x);
    case Activation::relu:
      return activate<Activation::relu>(x);
    default:
      return activate<Activation::silu>(x);
  }
}

}  // namespace octavo::cuda
