// Enough of CUDA to compile scan_kernels.cu with a C++ compiler and run it on any CPU, slowly: this is how the tests
// check the kernel without a GPU, and how you can change it without one:
//
//     pytest test_all.py -k emulated
//
// The threads of a block are fibres: each runs until it waits at a barrier, then another one does, in an order that is
// drawn anew for each round from `emulate_seed`. So whatever order a GPU may choose between two barriers may happen here,
// and a result that depends on it shows as different bits for another seed. Shared memory holds NaNs when a block starts.
// A __syncthreads on line `emulate_skip` is left out: what a test must notice. Linux and macOS (ucontext.h).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)
#define __expf std::exp
#define __syncthreads() emulation::wait_for_block(__LINE__)

using std::min;

struct dim3 { unsigned x, y = 1; dim3(int64_t x, int64_t y = 1) : x(x), y(y) {} };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct __nv_bfloat16 { uint16_t bits; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline __nv_bfloat16 __float2bfloat16(float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {uint16_t(x == x ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FFF)};
}
template <typename T> T __ldg(const T* p) { return *p; }
inline void atomicAdd(float* p, float x) { *p += x; }  // only one fibre runs at a time

float4 shared_memory[48 * 1024 / sizeof(float4)];
dim3 threadIdx(0), blockIdx(0), blockDim(0);
extern "C" { int emulate_seed = 0, emulate_skip = 0; }

namespace emulation {

constexpr int READY = 0, IN_WARP = -1, DONE = -2;  // or the line of the __syncthreads where it waits
struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  int waits, shuffles;
  float shuffled[2];
};
std::vector<Fibre> fibres;
ucontext_t scheduler;
void (*body)();

inline void wait(int where) {
  Fibre& self = fibres[threadIdx.x];
  self.waits = where;
  swapcontext(&self.context, &scheduler);
}
inline void wait_for_block(int line) {
  if (line != emulate_skip) wait(line);
}
inline float shuffle(float x, int mask) {  // two values in turn: nobody overwrites what another lane has yet to read
  Fibre& self = fibres[threadIdx.x];
  const int lane = threadIdx.x, turn = self.shuffles++ % 2;
  self.shuffled[turn] = x;
  wait(IN_WARP);
  return fibres[lane ^ mask].shuffled[turn];
}
inline void run_fibre() {
  body();
  fibres[threadIdx.x].waits = DONE;
}

// All threads of a block, to their end. Returns whether they ended: no barrier was reached by some of them only.
inline bool run_block(unsigned threads, std::mt19937& order_of) {
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& f = fibres[order[i] = i];
    f.waits = READY, f.shuffles = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &scheduler;
    makecontext(&f.context, run_fibre, 0);
  }
  for (;;) {
    std::shuffle(order.begin(), order.end(), order_of);
    for (unsigned i : order)
      if (fibres[i].waits == READY) threadIdx.x = i, swapcontext(&scheduler, &fibres[i].context);
    const auto all = [](unsigned from, unsigned to, int where) {
      return std::all_of(&fibres[from], &fibres[to - 1] + 1, [=](const Fibre& f) { return f.waits == where; });
    };
    if (all(0, threads, DONE)) return true;
    const bool together = fibres[0].waits > 0 && all(0, threads, fibres[0].waits);
    bool released = together;
    for (unsigned warp = 0; warp < threads; warp += 32)
      if (together || all(warp, warp + 32, IN_WARP)) {
        released = true;
        for (unsigned i = warp; i < warp + 32; ++i) fibres[i].waits = READY;
      }
    if (!released) return false;
  }
}

}  // namespace emulation

inline float __shfl_xor_sync(unsigned, float x, int mask) { return emulation::shuffle(x, mask); }

// kernel<<<grid, threads, bytes>>>(p). Returns 0; 1 where a barrier is not reached by all; 2 where more than `bytes` of
// shared memory are used.
template <typename P>
int emulate(void (*kernel)(P), const P& p, dim3 grid, unsigned threads, size_t bytes) {
  static void (*kernel_now)(P);
  static const P* p_now;
  kernel_now = kernel, p_now = &p, blockDim.x = threads;
  emulation::body = [] { kernel_now(*p_now); };
  emulation::fibres.resize(std::max<size_t>(emulation::fibres.size(), threads));
  std::mt19937 order_of(emulate_seed);
  char* const memory = reinterpret_cast<char*>(shared_memory);
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      std::memset(memory, 0xFF, sizeof shared_memory);  // NaNs
      if (!emulation::run_block(threads, order_of)) return 1;
      if (std::any_of(memory + bytes, memory + sizeof shared_memory, [](char c) { return c != char(0xFF); })) return 2;
    }
  return 0;
}
