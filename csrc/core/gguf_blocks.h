// Blocks of 256 weights of a GGUF file as codes, for the types that most such files have.
//
// octavo.weights.gguf_nibbles and gguf_bytes define what becomes of a block, and have its layout;
// these give the same bits in a third of the time.
#pragma once

#include <cstdint>

namespace octavo {

// Codes of blocks, one after the other; room for all of them.
struct BlockCodes {
  std::uint8_t* codes;  // int8, or int4 with two codes a byte
  void* scales;         // of each group of 32: float32 beside int4, float16 beside int8
  float* zeros;         // of each group; none beside int8
};

// One of the types that GGUF calls Q4_K, Q5_K and Q6_K.
struct BlockType {
  std::int64_t bytes;  // of a block
  bool is_int4;
  void (*convert)(const std::uint8_t* block, const BlockCodes& to);
};

constexpr std::int64_t kBlockWeights = 256, kBlockGroups = 8;

// By GGUF's name; null if there is none.
const BlockType* find_block_type(const char* name);

// So many blocks.
void convert_blocks(const BlockType& type, const std::uint8_t* blocks, std::int64_t count,
                    BlockCodes to);

}  // namespace octavo
