// What a call of a kernel works on: filled in by operators.h, read by scan_cpu.cpp and
// scan_kernels.cu. No torch here, so that scan_kernels.cu compiles quickly, and without CUDA too
// (emulate.h).
#pragma once
#include <cstdint>

constexpr int CHUNK = 64;  // tokens between two saved states: __init__.py's
constexpr int MAX_STATE = 64;

// All contiguous. States lie in memory as (batch, N, d_inner), N being d_state: neighbours in
// memory are neighbouring channels, which are worked on together.
struct Scan {
  int64_t batch, L, d_inner, N;
  bool bf16;  // are u, delta, B, C, dy, y, du and ddelta bf16? Otherwise fp32, always on the CPU.
  const void *u, *delta, *B, *C;
  const float *A, *D, *initial;  // A (N, d_inner)
  // Forward.
  void* y;
  float* final_state;
  float* starts;  // (batch, chunks - 1, N, d_inner): the states before chunks 1, 2, ...
  // Backward. Sums over channels, batch and time are written as parts, which operators.h adds up in
  // a fixed order: no atomics, the same bits in every run. dA (batch, parts, N, d_inner), dD
  // (batch, parts, d_inner), dB and dC (blocks of channels, batch, L, N); dA, dB, dC are zeros
  // before the call.
  const void* dy;
  const float* dfinal;
  void *du, *ddelta;
  float *dA, *dB, *dC, *dD, *dinitial;
};

// The CUDA kernels, in scan_kernels.cu. They return 0, or a CUDA error code.
constexpr int CUDA_PARTS = 8, CUDA_CHANNELS = 32;  // parts in time, channels of a block
extern "C" {
int scan_forward(const Scan& p, void* stream);
int scan_backward(const Scan& p, void* stream);
}
