// Everything that is not plain CUDA C++: PTX instructions and intrinsics, each under a name.
//
// Kernels are one source for the GPU and for the emulator in tests/emulator (docs/emulator.md),
// which has CUDA's intrinsics too (kernel.h there). A PTX instruction has two bodies: its own, and
// one that does the same on the host. Rules:
//
// - no asm, no intrinsic (`__shfl_sync`, `__expf`, ...) outside of this file and its parts,
//   numbers.cuh and tensor_cores.cuh (matrix products);
// - shared memory is dynamic (`shared_memory`), its size given at the launch;
// - blocks have one dimension; every launch goes through launch.cuh.
//
// PTX: "Parallel Thread Execution ISA", sections 9.7.8 (loads), 9.7.9 (cp.async), 9.7.14 (mma).
#pragma once

#include "cuda/device/numbers.cuh"

namespace octavo::cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- warps: all 32 lanes must call these together ----

OCTAVO_DEVICE unsigned lane_index() { return threadIdx.x % kWarp; }
OCTAVO_DEVICE unsigned warp_index() { return threadIdx.x / kWarp; }

OCTAVO_DEVICE void sync_warp() { __syncwarp(); }

// The value that lane `source` (0 to 31) holds. T: 4 or 8 bytes.
template <class T>
OCTAVO_DEVICE T shuffle(T value, unsigned source) {
  return __shfl_sync(kAllLanes, value, static_cast<int>(source));
}
template <class T>
OCTAVO_DEVICE T shuffle_xor(T value, unsigned mask) {
  return __shfl_xor_sync(kAllLanes, value, static_cast<int>(mask));
}
// From the lane `delta` below; the lowest lanes keep their own.
template <class T>
OCTAVO_DEVICE T shuffle_up(T value, unsigned delta) {
  return __shfl_up_sync(kAllLanes, value, delta);
}
// Bit i: whether lane i's predicate holds.
OCTAVO_DEVICE unsigned ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }

// In every lane the same bits: the butterfly combines the same pairs on both sides.
template <class T, class Combine>
OCTAVO_DEVICE T warp_reduce(T value, Combine&& combine) {
  for (unsigned mask = kWarp / 2; mask; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  return value;
}
OCTAVO_DEVICE float warp_sum(float value) { return warp_reduce(value, add_rn); }
OCTAVO_DEVICE float warp_max(float value) {
  return warp_reduce(value, [](float a, float b) { return fmaxf(a, b); });
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

// The number, loaded or stored as a whole, at an address that is a multiple of its size.
template <class Number, class Address>
OCTAVO_DEVICE Number& aligned_at(Address* address, [[maybe_unused]] const char* what) {
#ifdef OCTAVO_EMULATED
  cuda_emulator::check_aligned(address, sizeof(Number), what);
#endif
  return *static_cast<Number*>(address);
}
OCTAVO_DEVICE uint4 load_16(const void* address) {
  return aligned_at<const uint4>(address, "a load of 16 bytes");
}
OCTAVO_DEVICE uint2 load_8(const void* address) {
  return aligned_at<const uint2>(address, "a load of 8 bytes");
}
OCTAVO_DEVICE void store_16(void* address, uint4 value) {
  aligned_at<uint4>(address, "a store of 16 bytes") = value;
}
OCTAVO_DEVICE void store_8(void* address, uint2 value) {
  aligned_at<uint2>(address, "a store of 8 bytes") = value;
}

// load_16 for what is read once and by nobody else, as weights in decoding: past the first cache,
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
OCTAVO_DEVICE void keep_in_registers(uint2& value) {
#ifdef OCTAVO_EMULATED
  static_cast<void>(value);
#else
  asm volatile("" : "+r"(value.x), "+r"(value.y));
#endif
}
OCTAVO_DEVICE void keep_in_registers(uint4& value) {
#ifdef OCTAVO_EMULATED
  static_cast<void>(value);
#else
  asm volatile("" : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w));
#endif
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
  return atomicAdd(address, value);
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
