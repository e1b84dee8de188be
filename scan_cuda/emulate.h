// Enough of CUDA to compile scan_kernels.cu with a C++ compiler and run it on any CPU, slowly: this
// is how the tests check the kernel without a GPU, and how you can change it without one:
//
//     pytest test_all.py -k emulated
//
// The threads of a block are fibres: each runs until it waits at a barrier, then another one does,
// in an order drawn anew for each round from `emulate_seed`. So any order that a GPU may choose
// between two barriers can happen here, and a result that depends on it shows as different bits for
// another seed. Shared memory is all NaNs when a block starts. The __syncthreads on line
// `emulate_skip` is left out: a test must notice. Linux and macOS (ucontext.h).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)
#define __expf std::exp
#define __syncthreads() emulation::wait_for_block(__LINE__)
#define __shfl_xor_sync(mask, x, lanes) emulation::shuffle(x, lanes)

using std::min;

struct dim3 { unsigned x, y; dim3(int64_t x, int64_t y) : x(x), y(y) {} };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct __nv_bfloat16 { uint16_t bits; };
inline float2 make_float2(float x, float y) { return {x, y}; }
template <typename To, typename From> To same_bits(From x) {
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float __bfloat162float(__nv_bfloat16 x) { return same_bits<float>(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {  // to the nearest, ties to even
  const uint32_t bits = same_bits<uint32_t>(x);
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <typename T> T __ldg(const T* p) { return *p; }
inline void atomicAdd(float* p, float x) { *p += x; }  // only one fibre runs at a time

float4 shared_memory[48 * 1024 / sizeof(float4)];
dim3 threadIdx(0, 0), blockIdx(0, 0), blockDim(0, 0);
extern "C" { int emulate_seed = 0, emulate_skip = 0; }

namespace emulation {

// What a fibre waits for: one of these, or the line of a __syncthreads.
constexpr int READY = 0, IN_WARP = -1, DONE = -2;
struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  int waits, shuffles;
  float shuffled[2];
};
std::vector<Fibre> fibres;
ucontext_t scheduler;
std::function<void()> kernel;

inline void run() { kernel(), fibres[threadIdx.x].waits = DONE; }
inline void wait(int where) {
  Fibre& self = fibres[threadIdx.x];
  self.waits = where;
  swapcontext(&self.context, &scheduler);
}
inline void wait_for_block(int line) { if (line != emulate_skip) wait(line); }
inline float shuffle(float x, int lanes) {  // two places in turn: the last value may still be read
  const int thread = threadIdx.x, turn = fibres[thread].shuffles++ % 2;
  fibres[thread].shuffled[turn] = x;
  wait(IN_WARP);
  return fibres[thread ^ lanes].shuffled[turn];
}
inline bool all_wait(int from, int to, int where) {
  return std::all_of(&fibres[from], &fibres[0] + to,
                     [=](const Fibre& f) { return f.waits == where; });
}

// A block, from start to end. Returns false where some threads wait at a barrier that others never
// reach.
inline bool run_block(int threads, std::mt19937& random) {
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) {
    Fibre& f = fibres[order[i] = i];
    f.waits = READY, f.shuffles = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &scheduler;
    makecontext(&f.context, run, 0);
  }
  while (!all_wait(0, threads, DONE)) {
    std::shuffle(order.begin(), order.end(), random);
    for (int i : order)
      if (fibres[i].waits == READY) threadIdx.x = i, swapcontext(&scheduler, &fibres[i].context);
    const bool block = fibres[0].waits > 0 && all_wait(0, threads, fibres[0].waits);
    bool stuck = !all_wait(0, threads, DONE);
    for (int warp = 0; warp < threads; warp += 32)
      if (block || all_wait(warp, warp + 32, IN_WARP)) {
        for (int i = warp; i < warp + 32; ++i) fibres[i].waits = READY;
        stuck = false;
      }
    if (stuck) return false;
  }
  return true;
}

}  // namespace emulation

// kernel<<<grid, threads>>>(p). Returns 0, or 1 for a barrier that not all reach.
template <typename P>
int emulate(void (*kernel)(P), const P& p, dim3 grid, int threads) {
  emulation::kernel = [=] { kernel(p); };
  emulation::fibres.resize(std::max<size_t>(emulation::fibres.size(), threads));
  std::mt19937 random(emulate_seed);
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      std::memset(static_cast<void*>(shared_memory), 0xFF, sizeof shared_memory);  // NaNs
      if (!emulation::run_block(threads, random)) return 1;
    }
  return 0;
}
