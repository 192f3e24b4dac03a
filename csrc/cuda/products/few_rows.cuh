// Where a product of a few rows (multiply_few.cuh) gets x from, and what it does with its sums:
// each as the kernel of an op of its own would, to the bit.
//
// A source: rows, shared_bytes(), begin() before the wait for the kernel before, finish() after it,
// row(). A target: what a tile's 16 outputs are
// (one after the other, or eight pairs that one thread finishes together), ask() before the wait
// and ask_more() after it for whatever finishing an item takes, so that it is there when the sums
// are, and write(). An item is number `first + j` of the outputs, or pairs, `first` being the
// tile's first.
#pragma once

#include "cuda/elementwise/activation.cuh"
#include "cuda/elementwise/norm.cuh"
#include "cuda/elementwise/rope.cuh"

namespace octavo::cuda {

constexpr int kOutputs = 16;  // of a tile

// ---- sources ----

struct StoredRows {
  static constexpr bool kByExpert = false;
  static constexpr int kRowTiles = 1;  // of 8 rows each
  Numbers x;
  int rows;

  OCTAVO_HOST_DEVICE int shared_bytes() const { return 0; }
  OCTAVO_DEVICE void begin(unsigned char*) const {}
  template <class T>
  OCTAVO_DEVICE void finish(unsigned char*) const {}
  template <class T>
  OCTAVO_DEVICE const T* row(const unsigned char*, int r) const {
    return static_cast<const T*>(x.data) + r * x.stride;
  }
};

// 9 to 16 rows.
struct TwiceStoredRows : StoredRows {
  static constexpr int kRowTiles = 2;
};

// Every block normalizes all rows for itself.
struct NormedRows {
  static constexpr bool kByExpert = false;
  static constexpr int kRowTiles = 1;
  RowsToNorm norm;
  int rows;

  OCTAVO_HOST_DEVICE int shared_bytes() const { return norm.shared_bytes(); }
  OCTAVO_DEVICE void begin(unsigned char* shared) const { begin_norm(norm, shared); }
  template <class T>
  OCTAVO_DEVICE void finish(unsigned char* shared) const {
    finish_norm<T>(norm, shared);
  }
  template <class T>
  OCTAVO_DEVICE const T* row(const unsigned char* shared, int r) const {
    return reinterpret_cast<const T*>(shared) + r * norm.out_stride();
  }
};

// ---- targets ----

struct RowPair {  // of the matrix: two outputs that belong together
  int upper, lower;
};

// Finishing needs nothing besides the sums.
struct AsksNothing {
  struct Ahead {};
  OCTAVO_DEVICE void ask(Ahead&, int, int, int) const {}
  OCTAVO_DEVICE void ask_more(Ahead&, int, int, int) const {}
};

// out = sum.
struct WriteSums : AsksNothing {
  static constexpr bool kPairs = false;
  Numbers out;
  int count;  // outputs, or pairs of them

  template <class T>
  OCTAVO_DEVICE void write(const Ahead&, int row, int first, int j, float sum) const {
    write_number(out.data, out.dtype, row * out.stride + first + j, sum);
  }
};

// residual += the sum, rounded to T as the op would have written it.
struct AddSums {
  static constexpr bool kPairs = false;
  float* residual;
  long long stride;
  int count;

  struct Ahead {
    float residual;
  };
  OCTAVO_DEVICE void ask(Ahead&, int, int, int) const {}
  OCTAVO_DEVICE void ask_more(Ahead& ahead, int row, int first, int j) const {
    ahead.residual = residual[row * stride + first + j];
  }
  template <class T>
  OCTAVO_DEVICE void write(const Ahead& ahead, int row, int first, int j, float sum) const {
    residual[row * stride + first + j] = add_rn(ahead.residual, to_float(from_float<T>(sum)));
  }
};

// out = activation(gate) * up, where up lies `count` outputs behind gate.
struct WriteGated : AsksNothing {
  static constexpr bool kPairs = true;
  void* out;
  long long stride;
  Activation activation;
  int count;

  OCTAVO_DEVICE RowPair pair(int first, int j) const { return {first + j, first + j + count}; }

  template <class T>
  OCTAVO_DEVICE void write(const Ahead&, int row, int first, int j, float gate, float up) const {
    const float open = activate(activation, to_float(from_float<T>(gate)));
    static_cast<T*>(out)[row * stride + first + j] =
        from_float<T>(multiply_rn(open, to_float(from_float<T>(up))));
  }
};

// q into qkv, k and v to the step's slots, q and k rotated: pairs are elements i and
// i + head_dim / 2 of a head, and 8 pairs in a row are of one head.
struct RotateAndStore {
  static constexpr bool kPairs = true;
  RopeArguments a;
  int count;

  OCTAVO_DEVICE int half() const { return a.head_dim / 2; }
  OCTAVO_DEVICE RowPair pair(int first, int j) const {
    const int upper = first / half() * half() + first + j;
    return {upper, upper + half()};
  }

  struct Ahead {
    int angles, slot;
    float cosine, sine;
  };
  OCTAVO_DEVICE bool rotates(int head) const {
    return a.cosines && head < a.num_heads + a.num_kv_heads;
  }
  OCTAVO_DEVICE void ask(Ahead& ahead, int row, int first, int) const {
    const int head = first / half();
    if (rotates(head)) ahead.angles = a.rows[row];
    if (head >= a.num_heads) ahead.slot = a.slots[row];
  }
  OCTAVO_DEVICE void ask_more(Ahead& ahead, int, int first, int j) const {
    const int head = first / half(), i = first - head * half() + j;
    if (!rotates(head)) return;
    const long long angle = static_cast<long long>(ahead.angles) * half() + i;
    ahead.cosine = a.cosines[angle];
    ahead.sine = a.sines[angle];
  }
  template <class T>
  OCTAVO_DEVICE void write(const Ahead& ahead, int row, int first, int j, float upper,
                           float lower) const {
    const int head = first / half(), i = first - head * half() + j;
    T low = from_float<T>(upper), high = from_float<T>(lower);
    if (rotates(head)) {
      upper = to_float(low);
      lower = to_float(high);
      low = turned_first<T>(upper, lower, ahead.cosine, ahead.sine);
      high = turned_second<T>(upper, lower, ahead.cosine, ahead.sine);
    }
    if (head < a.num_heads) {
      T* q = static_cast<T*>(a.qkv) + row * a.stride + head * a.head_dim;
      q[i] = low;
      q[i + half()] = high;
    } else if (ahead.slot >= 0) {
      const Place place(a, ahead.slot, head);
      place.store(i, to_float(low), 1.0f);
      place.store(i + half(), to_float(high), 1.0f);
    }
  }
};

}  // namespace octavo::cuda
