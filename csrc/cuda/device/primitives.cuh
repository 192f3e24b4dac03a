// Everything that is not plain CUDA C++: PTX instructions and intrinsics, each under a name.
//
// Every primitive has two bodies: the GPU's, and one that does the same on the host, for the
// emulator in tests/emulator (docs/emulator.md). So kernels are one source for both. Rules:
//
// - no asm, no intrinsic (`__shfl_sync`, `__expf`, ...) outside of this file and its parts,
//   numbers.cuh and tensor_cores.cuh (matrix products);
// - shared memory is dynamic (`shared_memory`), its size given at the launch;
// - every launch goes through launch.cuh.
//
// PTX: "Parallel Thread Execution ISA", sections 9.7.8 (loads), 9.7.9 (cp.async), 9.7.14 (mma).
#pragma once

#include "cuda/device/numbers.cuh"

namespace octavo::cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- warps: all 32 lanes must call these together ----

OCTAVO_DEVICE unsigned thread_in_block() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
OCTAVO_DEVICE unsigned lane_index() { return thread_in_block() % kWarp; }
OCTAVO_DEVICE unsigned warp_index() { return thread_in_block() / kWarp; }

OCTAVO_DEVICE void sync_warp() {
#ifdef OCTAVO_EMULATED
  cuda_emulator::warp_collective(kAllLanes, "__syncwarp", nullptr, [](void* const*) {});
#else
  __syncwarp();
#endif
}

// The value that lane `source` (0 to 31) holds. T: 4 or 8 bytes.
template <class T>
OCTAVO_DEVICE T shuffle(T value, unsigned source) {
#ifdef OCTAVO_EMULATED
  struct Lane {
    T value, result;
    unsigned source;
  } mine{value, value, source};
  cuda_emulator::warp_collective(kAllLanes, "__shfl_sync", &mine, [](void* const* lanes) {
    for (unsigned i = 0; i < kWarp; ++i) {
      auto& lane = *static_cast<Lane*>(lanes[i]);
      lane.result = static_cast<Lane*>(lanes[lane.source % kWarp])->value;
    }
  });
  return mine.result;
#else
  return __shfl_sync(kAllLanes, value, static_cast<int>(source));
#endif
}

template <class T>
OCTAVO_DEVICE T shuffle_xor(T value, unsigned mask) {
#ifdef OCTAVO_EMULATED
  return shuffle(value, lane_index() ^ mask);
#else
  return __shfl_xor_sync(kAllLanes, value, static_cast<int>(mask));
#endif
}

// From the lane `delta` below; the lowest lanes keep their own.
template <class T>
OCTAVO_DEVICE T shuffle_up(T value, unsigned delta) {
#ifdef OCTAVO_EMULATED
  return shuffle(value, lane_index() >= delta ? lane_index() - delta : lane_index());
#else
  return __shfl_up_sync(kAllLanes, value, delta);
#endif
}

// Bit i: whether lane i's predicate holds.
OCTAVO_DEVICE unsigned ballot(bool predicate) {
#ifdef OCTAVO_EMULATED
  struct Lane {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  cuda_emulator::warp_collective(kAllLanes, "__ballot_sync", &mine, [](void* const* lanes) {
    unsigned bits = 0;
    for (unsigned i = 0; i < kWarp; ++i)
      bits |= static_cast<unsigned>(static_cast<Lane*>(lanes[i])->predicate) << i;
    for (unsigned i = 0; i < kWarp; ++i) static_cast<Lane*>(lanes[i])->result = bits;
  });
  return mine.result;
#else
  return __ballot_sync(kAllLanes, predicate);
#endif
}

// In every lane the same bits: the butterfly adds the same pairs on both sides.
OCTAVO_DEVICE float warp_sum(float value) {
  for (unsigned mask = kWarp / 2; mask; mask /= 2) value = add_rn(value, shuffle_xor(value, mask));
  return value;
}
OCTAVO_DEVICE float warp_max(float value) {
  for (unsigned mask = kWarp / 2; mask; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

// ---- memory ----

// The block's shared memory, aligned to 128 bytes.
OCTAVO_DEVICE unsigned char* shared_memory() {
#ifdef OCTAVO_EMULATED
  return static_cast<unsigned char*>(cuda_emulator::shared_memory());
#else
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
#endif
}

// Tells the compiler what it cannot see where a pointer comes out of shared memory.
template <class T>
OCTAVO_DEVICE T* in_global_memory(T* pointer) {
#ifndef OCTAVO_EMULATED
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// 16 bytes from an address that is a multiple of 16.
OCTAVO_DEVICE uint4 load_16(const void* address) {
#ifdef OCTAVO_EMULATED
  cuda_emulator::check_aligned(address, 16, "a load of 16 bytes");
#endif
  return *static_cast<const uint4*>(address);
}

// 8 bytes from or to an address that is a multiple of 8.
OCTAVO_DEVICE uint2 load_8(const void* address) {
#ifdef OCTAVO_EMULATED
  cuda_emulator::check_aligned(address, 8, "a load of 8 bytes");
#endif
  return *static_cast<const uint2*>(address);
}

OCTAVO_DEVICE void store_8(void* address, uint2 value) {
#ifdef OCTAVO_EMULATED
  cuda_emulator::check_aligned(address, 8, "a store of 8 bytes");
#endif
  *static_cast<uint2*>(address) = value;
}

// The same for what is read once and by nobody else, as weights in decoding: past the first cache,
// first to be evicted from the second. Never for what the kernel before may still be writing.
// Not ld.global.nc: ptxas puts such loads off until after griddepcontrol.wait, and with it the
// whole gain of starting early (seen in the machine code that CUDA 13.0 makes for sm_90).
OCTAVO_DEVICE uint4 load_16_once(const void* address) {
#ifdef OCTAVO_EMULATED
  return load_16(address);
#else
  uint4 v;
  asm("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
  return v;
#endif
}

// The same value, of which the compiler does not know so: what follows from it is computed where it
// is used, not once for all and kept in registers that a loop has none to spare of.
OCTAVO_DEVICE int computed_anew(int value) {
#ifndef OCTAVO_EMULATED
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// What was loaded into it is loaded before whatever follows: the compiler may not put it off.
OCTAVO_DEVICE void keep_in_registers(uint4& value) {
#ifdef OCTAVO_EMULATED
  static_cast<void>(value);
#else
  asm volatile("" : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w));
#endif
}
OCTAVO_DEVICE void keep_in_registers(uint2& value) {
#ifdef OCTAVO_EMULATED
  static_cast<void>(value);
#else
  asm volatile("" : "+r"(value.x), "+r"(value.y));
#endif
}

OCTAVO_DEVICE void store_16(void* address, uint4 value) {
#ifdef OCTAVO_EMULATED
  cuda_emulator::check_aligned(address, 16, "a store of 16 bytes");
#endif
  *static_cast<uint4*>(address) = value;
}

// cp.async: copies 16 bytes to shared memory in the background, or, where not `valid`, writes 16
// zeros (and reads nothing). Both addresses are multiples of 16.
OCTAVO_DEVICE void async_copy_16(void* shared, const void* global, bool valid = true) {
#ifdef OCTAVO_EMULATED
  cuda_emulator::async_copy(shared, global, valid ? 16 : 0, valid ? 0 : 16);
#else
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#endif
}
// The same by way of the first-level cache: for what other blocks of the processor copy as well.
OCTAVO_DEVICE void async_copy_16_cached(void* shared, const void* global) {
#ifdef OCTAVO_EMULATED
  cuda_emulator::async_copy(shared, global, 16, 0);
#else
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#endif
}
// Ends a group of copies.
OCTAVO_DEVICE void async_commit() {
#ifdef OCTAVO_EMULATED
  cuda_emulator::async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `groups_left` of this thread's groups are under way. Other threads' copies
// are seen after a __syncthreads() that follows.
template <unsigned groups_left>
OCTAVO_DEVICE void async_wait() {
#ifdef OCTAVO_EMULATED
  cuda_emulator::async_wait(groups_left);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
#endif
}

// Returns the value before.
template <class T>
OCTAVO_DEVICE T atomic_add(T* address, T value) {
#ifdef OCTAVO_EMULATED
  const T before = *address;
  *address = before + value;
  return before;
#else
  return atomicAdd(address, value);
#endif
}
template <class T>
OCTAVO_DEVICE T atomic_max(T* address, T value) {
#ifdef OCTAVO_EMULATED
  const T before = *address;
  if (value > before) *address = value;
  return before;
#else
  return atomicMax(address, value);
#endif
}
// Returns the value before. What this thread wrote before, and what others wrote before a barrier
// that it passed since, is seen by whoever adds to the counter afterwards, and by those who pass a
// barrier with it: one thread's release and acquire do for its whole block (PTX, "Memory
// Consistency Model": causality order is transitive, and barriers are part of it).
template <class T>
OCTAVO_DEVICE T atomic_add_acquire_release(T* address, T value) {
  static_assert(sizeof(T) == 4, "32 bits, with a sign or without");
#ifdef OCTAVO_EMULATED
  return atomic_add(address, value);
#else
  T before;
  asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(address), "r"(value)
               : "memory");
  return before;
#endif
}
// What this thread wrote before is seen by whoever sees what it writes afterwards.
OCTAVO_DEVICE void fence() {
#ifndef OCTAVO_EMULATED
  __threadfence();
#endif
}
// Waits until another block has made *counter `value` or more, and sees what it wrote before. The
// other must have started for sure, and not wait for this one. (In the emulator, where blocks run
// one after another, it must have ended.)
OCTAVO_DEVICE void wait_for_count(const unsigned* counter, unsigned value) {
#ifdef OCTAVO_EMULATED
  if (*counter < value) cuda_emulator::fail("waits for a block that may not have started");
#else
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < value);
#endif
}
// Lets others see `value` in *counter, and with it all that this block wrote before its last
// __syncthreads().
OCTAVO_DEVICE void publish_count(unsigned* counter, unsigned value) {
#ifdef OCTAVO_EMULATED
  *counter = value;
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
#endif
}

// ---- kernels that overlap with the one before (programmatic dependent launch, sm_90) ----

// Until here the kernel may run before its predecessor has ended: only weights may be read before.
OCTAVO_DEVICE void wait_for_previous_kernel() {
#ifdef OCTAVO_EMULATED
  cuda_emulator::wait_for_previous_kernel();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on the next kernel may be started.
OCTAVO_DEVICE void let_next_kernel_start() {
#if !defined(OCTAVO_EMULATED) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" :::);
#endif
}

}  // namespace octavo::cuda
