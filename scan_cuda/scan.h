// What one call works on: build.py fills it in, scan_cpu.cpp or scan_kernels.cu does the work. No torch here: the
// kernels compile in seconds, and for any version of it.
#pragma once
#include <cstdint>

constexpr int CHUNK = 64;  // tokens between two saved states: __init__.py's
constexpr int MAX_STATE = 64;

// All contiguous, but the rows of B and C may be slices of wider rows. States lie in memory as (batch, N, d_inner) with
// N = d_state: neighbours in memory are neighbouring channels, which are worked on together.
struct Scan {
  int64_t batch, L, d_inner, N, B_stride, C_stride;  // strides: from token to token
  int64_t bf16, threads;  // bf16: u, delta, B, C, dy, y, du, ddelta are bf16 (GPU only), otherwise fp32; threads: CPU only
  const void *u, *delta, *B, *C;
  const float *A, *D, *initial;  // A (N, d_inner). D and initial may be null: zeros
  void* y;
  float *final_state, *starts;  // starts (batch, chunks - 1, N, d_inner): the states before each chunk but the first
  // Backward. Sums over channels, batch and time are written as parts, then added in a fixed order: no atomics, the
  // same bits in every run.  dA (batch, parts, N, d_inner)   dD (batch, parts, d_inner)   dB, dC (parts, batch, L, N)
  const void* dy;
  const float* dfinal;  // may be null: zeros
  void *du, *ddelta;
  float *dA, *dB, *dC, *dD, *dinitial;  // dA, dB and dC are zeros before the call
};

extern "C" {
extern const int scan_parts, scan_channels, scan_takes_bf16;  // parts in time, channels of a part, 0 or 1
// Each returns 0, or a CUDA error code.
int scan_forward(const Scan& p, void* stream);
int scan_backward(const Scan& p, void* stream);
// On the CPU only. x (batch, L + 3, d), y, dy (batch, L, d), weight (4, d). The gradients are zeros before the call;
// dweight (batch, 4, d) and dbias (batch, d) are parts.
void conv_forward(int64_t batch, int64_t L, int64_t d, int64_t threads, float* y, const float* x, const float* weight,
                  const float* bias);
void conv_backward(int64_t batch, int64_t L, int64_t d, int64_t threads, const float* dy, const float* x,
                   const float* weight, const float* bias, float* dx, float* dweight, float* dbias);
}
