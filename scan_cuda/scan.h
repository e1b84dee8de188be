// What one call works on: filled in by build.py, read by scan_cpu.cpp and scan_kernels.cu. No torch here.
#pragma once
#include <cstdint>

constexpr int CHUNK = 64;  // tokens between two saved states: __init__.py's
constexpr int MAX_STATE = 64;

// All contiguous, but the rows of B and C may be slices of wider rows. States lie in memory as (batch, N,
// d_inner), N being d_state: neighbours in memory are neighbouring channels, which are worked on together.
struct Scan {
  int64_t batch, L, d_inner, N, B_stride, C_stride;  // strides: from token to token
  int64_t bf16;     // are u, delta, B, C, dy, y, du and ddelta bf16? Otherwise fp32, always on the CPU.
  int64_t threads;  // CPU only
  const void *u, *delta, *B, *C;
  const float *A, *D, *initial;  // A (N, d_inner). D and initial may be null: zeros
  void* y;
  float *final_state, *starts;  // starts (batch, chunks - 1, N, d_inner): the states before chunks 1, 2, ...
  // Backward. Sums over channels, batch and time are written as parts, which build.py adds up in a fixed
  // order: no atomics, the same bits in every run. dA (batch, parts, N, d_inner), dD (batch, parts, d_inner),
  // dB and dC (blocks of channels, batch, L, N); dA, dB, dC are zeros before the call.
  const void* dy;
  const float* dfinal;  // may be null: zeros
  void *du, *ddelta;
  float *dA, *dB, *dC, *dD, *dinitial;
};

extern "C" {
extern const int scan_parts, scan_channels, scan_takes_bf16;  // parts in time, channels of a block, 0 or 1
int scan_forward(const Scan& p, void* stream);                // 0, or a CUDA error code
int scan_backward(const Scan& p, void* stream);
}
