// Blocks of a GGUF file as codes, for the types that most such files have.
//
// octavo.weights.gguf_nibbles and gguf_bytes define what becomes of a block, and have its layout;
// these give the same bits in a fraction of the time.
#pragma once

#include <cstdint>

namespace octavo {

// Codes of blocks, one after the other; room for all of them.
struct BlockCodes {
  std::uint8_t* codes;   // int8, or int4 with two codes a byte
  std::uint8_t* scales;  // of each group of 32, float16 or float32
  float* zeros;          // of each group, in types with zero points
};

// A type of GGUF; its blocks have `inputs` weights in `bytes`.
struct BlockType {
  const char* name;
  std::int64_t bytes, inputs;
  bool is_int4, has_zeros;  // with zero points scales are float32, else float16
  void (*convert)(const std::uint8_t* block, const BlockCodes& to);

  std::int64_t code_bytes() const { return inputs / (is_int4 ? 2 : 1); }
  std::int64_t groups() const { return inputs / 32; }
  std::int64_t scale_bytes() const { return groups() * (has_zeros ? 4 : 2); }
};

// By GGUF's name; null if there is none.
const BlockType* find_block_type(const char* name);

// So many blocks.
void convert_blocks(const BlockType& type, const std::uint8_t* blocks, std::int64_t count,
                    BlockCodes to);

}  // namespace octavo
