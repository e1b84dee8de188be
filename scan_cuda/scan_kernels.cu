// The selective scan on the GPU, forward and backward, parallel over the sequence (the formulas: __init__.py).
//
// The idea. A token maps the state h to a h + b with a = exp(delta A), b = delta u B. Two tokens one after the other are
// again such a map,   (a1, b1) then (a2, b2)  =  (a1 a2, a2 b1 + b2),   and this joining is associative: pairs may be
// joined in any grouping as long as they stay in order. So a long sequence is cut in segments, each is reduced to one
// pair by itself, in parallel, and only these pairs are joined one after the other. Eight tokens, four segments:
//
//     tokens      (a,b)0 (a,b)1 | (a,b)2 (a,b)3 | (a,b)4 (a,b)5 | (a,b)6 (a,b)7
//     1. reduce        P0,H0    |     P1,H1     |     P2,H2     |     P3,H3         every segment by itself, from h = 0
//     2. join     h             | P0 h + H0     | P1(P0 h+H0)+H1| ...               h: the state before the chunk
//     3. replay   h_0    h_1    | h_2    h_3    | h_4    h_5    | h_6    h_7        every segment, from its true start
//
// Steps 1 and 3 touch each token once, step 2 a pair per segment: work proportional to L. The exponentials of step 1 stay
// in registers for step 3, so there is one per (token, channel, state), plus one per segment: P = exp(A sum of delta).
//
// Who does what. A block owns one batch element and CHANNELS neighbouring channels and walks through the sequence in
// chunks of SEGMENTS x TOKENS tokens, carrying the state in shared memory. A half-warp owns a segment; a thread two of
// its channels, 16 apart, so that what a half-warp reads of u, delta, dy is 64 contiguous bytes and nothing need be
// transposed; and B_t[n], C_t[n], the same for all channels, are fetched from shared memory once for two. The d_state
// states come in groups of GROUP, as many as registers hold. Buffers that one step writes and the other threads read are
// doubled and used in turn, so that each step needs a single __syncthreads.
//
// Backward runs over the chunks from last to first with the same three steps in both directions: states forwards, from
// the state the forward pass saved before each chunk, and g_t = dLoss/dh_t = C_t dy_t + a_{t+1} g_{t+1} backwards. Sums
// over channels, batch and segments are written as parts and added in a fixed order: no atomics, the same bits each run.
//
// No torch here: nvcc alone compiles this file. scan_binding.cpp calls the two functions at its end.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int SEGMENTS = 8, TOKENS = 8, CHUNK = SEGMENTS * TOKENS;  // CHUNK is __init__.py's
constexpr int HALF = 16, PER_THREAD = 2, CHANNELS = HALF * PER_THREAD;
constexpr int THREADS = SEGMENTS * HALF;
constexpr int GROUP = 4;
constexpr float LOG2E = 1.44269504f;  // exp(x) = 2^(x log2 e); A is multiplied by it when it is read

struct Problem {
  int batch, L, d_inner, N, chunks;
  int64_t B_stride, C_stride;  // from token to token, in elements
  const float *A, *D, *initial;
  float* starts;  // (batch, chunks - 1, N, d_inner)
};

__device__ float read(const float* p) { return *p; }
__device__ float read(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ void write(float* p, float x) { *p = x; }
__device__ void write(__nv_bfloat16* p, float x) { *p = __float2bfloat16(x); }

__device__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__host__ __device__ int padded(int N) { return (N + GROUP - 1) / GROUP * GROUP; }

// What a thread is, and its way through memory.
struct Position {
  int lane, segment, b, c0;
  __device__ Position(const Problem& p) {
    lane = threadIdx.x % HALF;
    segment = threadIdx.x / HALF;
    const int blocks = (p.d_inner + CHANNELS - 1) / CHANNELS;
    b = blockIdx.x / blocks;
    c0 = blockIdx.x % blocks * CHANNELS;
  }
  __device__ int channel(int j) const { return c0 + lane + HALF * j; }
  __device__ int first(int chunk) const { return chunk * CHUNK + segment * TOKENS; }
  __device__ int64_t state(const Problem& p, int n, int c) const { return (int64_t(b) * p.d_inner + c) * p.N + n; }
  __device__ int64_t start(const Problem& p, int chunk, int n, int c) const {
    return ((int64_t(b) * (p.chunks - 1) + chunk - 1) * p.N + n) * p.d_inner + c;
  }
};

// This thread's TOKENS tokens of its channels; zeros past the end of the sequence (where a = 1 and b = 0 then leave
// the state as it is) and of the channels.
template <typename Io>
__device__ void read_tokens(float (&to)[PER_THREAD][TOKENS], const Io* from, const Problem& p, const Position& at, int t0) {
  from += (int64_t(at.b) * p.L + t0) * p.d_inner;
#pragma unroll
  for (int i = 0; i < TOKENS; ++i, from += p.d_inner)
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j)
      to[j][i] = t0 + i < p.L && at.channel(j) < p.d_inner ? read(from + at.channel(j)) : 0.f;
}

template <typename Io>
__device__ void write_tokens(Io* to, const float (&from)[PER_THREAD][TOKENS], const Problem& p, const Position& at, int t0) {
  to += (int64_t(at.b) * p.L + t0) * p.d_inner;
#pragma unroll
  for (int i = 0; i < TOKENS; ++i, to += p.d_inner)
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j)
      if (t0 + i < p.L && at.channel(j) < p.d_inner) write(to + at.channel(j), from[j][i]);
}

// States n0 .. n0 + GROUP of B or C at the segment's tokens, to[n][i]. The half-warp reads them for itself.
template <typename Io>
__device__ void read_rows(float* to, const Io* from, int64_t stride, const Problem& p, const Position& at, int t0, int n0) {
  for (int k = at.lane; k < TOKENS * GROUP; k += HALF) {
    const int i = k / GROUP, n = k % GROUP;
    to[n * TOKENS + i] = t0 + i < p.L && n0 + n < p.N ? read(from + (int64_t(at.b) * p.L + t0 + i) * stride + n0 + n) : 0.f;
  }
}

__device__ void copy_row(float (&to)[TOKENS], const float* from) {
#pragma unroll
  for (int i = 0; i < TOKENS; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + i);
    to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
  }
}

// Shared memory, in floats, in this order. `pairs` holds (P, H) of every segment; backward has a second one for (P, G).
constexpr int PAIRS = SEGMENTS * GROUP * PER_THREAD * HALF;  // float2, one of the two buffers
constexpr int ROWS = SEGMENTS * 2 * GROUP * TOKENS;
__host__ __device__ int shared_floats(int N, bool backward) {
  const int per_state = padded(N) * CHANNELS;
  return (backward ? 2 : 1) * 2 * PAIRS * 2 + ROWS + 3 * per_state + (backward ? (padded(N) + 1) * PER_THREAD * THREADS : 0);
}
__device__ int pair_index(int segment, int n, int j, int lane) {
  return ((segment * GROUP + n) * PER_THREAD + j) * HALF + lane;
}

// A, and the carried state: from (batch, d_inner, N) in memory to [n][channel]; zeros where there is none.
__device__ void read_states(float* to, const float* from, const Problem& p, const Position& at, float factor) {
  for (int k = threadIdx.x; k < padded(p.N) * CHANNELS; k += THREADS) {
    const int n = k / CHANNELS, c = at.c0 + k % CHANNELS;
    to[k] = from && n < p.N && c < p.d_inner ? from[int64_t(c) * p.N + n] * factor : 0.f;
  }
}
__device__ void write_states(float* to, const float* from, const Problem& p, const Position& at) {
  for (int k = threadIdx.x; k < p.N * CHANNELS; k += THREADS) {
    const int n = k % p.N, c = k / p.N;
    if (at.c0 + c < p.d_inner) to[at.state(p, n, at.c0 + c)] = from[n * CHANNELS + c];
  }
}

template <typename Io>
__global__ void __launch_bounds__(THREADS, 3)
forward_kernel(Problem p, const Io* __restrict__ u, const Io* __restrict__ delta, const Io* __restrict__ B,
               const Io* __restrict__ C, Io* __restrict__ y, float* __restrict__ final_state) {
  extern __shared__ float4 shared[];
  float2* const pairs = reinterpret_cast<float2*>(shared);  // [2][segment][n][j][lane]
  float* const rows = reinterpret_cast<float*>(pairs + 2 * PAIRS);  // [segment][B or C][n][token]
  float* const A = rows + ROWS;  // [n][channel]
  float* const carry = A + padded(p.N) * CHANNELS;  // [2][n][channel]
  const int carry_size = padded(p.N) * CHANNELS;
  const Position at(p);
  float* const B_row = rows + at.segment * 2 * GROUP * TOKENS;
  float* const C_row = B_row + GROUP * TOKENS;

  read_states(A, p.A, p, at, LOG2E);
  read_states(carry, p.initial ? p.initial + at.state(p, 0, 0) : nullptr, p, at, 1.f);
  __syncthreads();

  int turn = 0;  // which of the two buffers of `pairs`
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    const int t0 = at.first(chunk);
    const float* const h_in = carry + (chunk & 1) * carry_size;
    float* const h_out = carry + (~chunk & 1) * carry_size;
    float d[PER_THREAD][TOKENS], du[PER_THREAD][TOKENS], out[PER_THREAD][TOKENS], sum[PER_THREAD];
    read_tokens(d, delta, p, at, t0);
    read_tokens(du, u, p, at, t0);
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
      sum[j] = 0.f;
#pragma unroll
      for (int i = 0; i < TOKENS; ++i) {
        out[j][i] = 0.f;
        du[j][i] *= d[j][i];
        sum[j] += d[j][i];
      }
    }
    for (int n0 = 0; n0 < p.N; n0 += GROUP, turn ^= 1) {
      read_rows(B_row, B, p.B_stride, p, at, t0, n0);
      read_rows(C_row, C, p.C_stride, p, at, t0, n0);
      __syncwarp();
      float a[GROUP][PER_THREAD][TOKENS];
#pragma unroll
      for (int n = 0; n < GROUP; ++n) {  // 1. reduce
        float Bn[TOKENS];
        copy_row(Bn, B_row + n * TOKENS);
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
          const float An = A[(n0 + n) * CHANNELS + at.lane + HALF * j];
          float h = 0.f;
#pragma unroll
          for (int i = 0; i < TOKENS; ++i) {
            a[n][j][i] = exp2_fast(d[j][i] * An);
            h = a[n][j][i] * h + du[j][i] * Bn[i];
          }
          pairs[turn * PAIRS + pair_index(at.segment, n, j, at.lane)] = make_float2(exp2_fast(sum[j] * An), h);
        }
      }
      __syncthreads();
#pragma unroll
      for (int n = 0; n < GROUP; ++n) {
        float Bn[TOKENS], Cn[TOKENS];
        copy_row(Bn, B_row + n * TOKENS);
        copy_row(Cn, C_row + n * TOKENS);
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
          const int at_state = (n0 + n) * CHANNELS + at.lane + HALF * j;
          float h = h_in[at_state];
          if (at.segment == 0 && chunk > 0 && n0 + n < p.N && at.channel(j) < p.d_inner)
            p.starts[at.start(p, chunk, n0 + n, at.channel(j))] = h;
          for (int s = 0; s < at.segment; ++s) {  // 2. join
            const float2 pair = pairs[turn * PAIRS + pair_index(s, n, j, at.lane)];
            h = pair.x * h + pair.y;
          }
#pragma unroll
          for (int i = 0; i < TOKENS; ++i) {  // 3. replay
            h = a[n][j][i] * h + du[j][i] * Bn[i];
            out[j][i] += Cn[i] * h;
          }
          if (at.segment == SEGMENTS - 1) h_out[at_state] = h;
        }
      }
      __syncwarp();  // before the rows are overwritten
    }
    read_tokens(du, u, p, at, t0);
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
      const float skip = p.D && at.channel(j) < p.d_inner ? p.D[at.channel(j)] : 0.f;
#pragma unroll
      for (int i = 0; i < TOKENS; ++i) out[j][i] += skip * du[j][i];
    }
    write_tokens(y, out, p, at, t0);
  }
  __syncthreads();
  write_states(final_state, carry + (p.chunks & 1) * carry_size, p, at);
}

struct Gradients {  // parts: dB, dC (channel blocks, batch, L, N), dA (batch, N, d_inner), dD (batch, d_inner)
  float *A, *B, *C, *D, *initial;
};

// v[k] summed over the half-warp, for its 16 k at once: lane k gets the sum of v[k]. Each round hands half of what is
// left to the lane on the other side and adds what comes from there: 15 shuffles where 16 separate sums take 64.
__device__ float sums(float (&v)[HALF], int lane) {
#pragma unroll
  for (int s = HALF / 2; s > 0; s /= 2)
#pragma unroll
    for (int k = 0; k < HALF / 2; ++k)
      if (k < s) {
        const float give = lane & s ? v[k] : v[k + s], keep = lane & s ? v[k + s] : v[k];
        v[k] = keep + __shfl_xor_sync(0xffffffffu, give, s);
      }
  return v[0];
}

template <typename Io>
__global__ void __launch_bounds__(THREADS, 2)
backward_kernel(Problem p, const Io* __restrict__ u, const Io* __restrict__ delta, const Io* __restrict__ B,
                const Io* __restrict__ C, const Io* __restrict__ dy, const float* __restrict__ dfinal,
                Io* __restrict__ grad_u, Io* __restrict__ grad_delta, Gradients to) {
  extern __shared__ float4 shared[];
  float2* const pairs = reinterpret_cast<float2*>(shared);  // (P, H): [2][segment][n][j][lane]
  float2* const g_pairs = pairs + 2 * PAIRS;                // (P, G)
  float* const rows = reinterpret_cast<float*>(g_pairs + 2 * PAIRS);
  float* const A = rows + ROWS;
  float* const carry = A + padded(p.N) * CHANNELS;  // [2][n][channel]: a_{t+1} g_{t+1} from the chunk behind
  const int carry_size = padded(p.N) * CHANNELS;
  float* const dA = carry + 2 * carry_size;  // [n][j][thread], and one row more for dD
  float* const dD = dA + padded(p.N) * PER_THREAD * THREADS;
  const Position at(p);
  float* const B_row = rows + at.segment * 2 * GROUP * TOKENS;
  float* const C_row = B_row + GROUP * TOKENS;

  read_states(A, p.A, p, at, LOG2E);
  read_states(carry, dfinal ? dfinal + at.state(p, 0, 0) : nullptr, p, at, 1.f);
  for (int k = threadIdx.x; k < (padded(p.N) + 1) * PER_THREAD * THREADS; k += THREADS) dA[k] = 0.f;
  __syncthreads();

  int turn = 0;
  for (int chunk = p.chunks - 1, step = 0; chunk >= 0; --chunk, ++step) {
    const int t0 = at.first(chunk);
    const float* const g_in = carry + (step & 1) * carry_size;
    float* const g_out = carry + (~step & 1) * carry_size;
    float d[PER_THREAD][TOKENS], du[PER_THREAD][TOKENS], e[PER_THREAD][TOKENS], sum[PER_THREAD];
    float gB[PER_THREAD][TOKENS], gA[PER_THREAD][TOKENS];  // gradients of delta u, and of delta through delta A
    read_tokens(d, delta, p, at, t0);
    read_tokens(du, u, p, at, t0);
    read_tokens(e, dy, p, at, t0);
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
      float eu = 0.f;
      sum[j] = 0.f;
#pragma unroll
      for (int i = 0; i < TOKENS; ++i) {
        eu += e[j][i] * du[j][i];
        du[j][i] *= d[j][i];
        sum[j] += d[j][i];
        gB[j][i] = gA[j][i] = 0.f;
      }
      dD[j * THREADS + threadIdx.x] += eu;
    }
    for (int n0 = 0; n0 < p.N; n0 += GROUP, turn ^= 1) {
      read_rows(B_row, B, p.B_stride, p, at, t0, n0);
      read_rows(C_row, C, p.C_stride, p, at, t0, n0);
      __syncwarp();
      float a[GROUP][PER_THREAD][TOKENS];
#pragma unroll
      for (int n = 0; n < GROUP; ++n) {  // 1. reduce, in both directions
        float Bn[TOKENS], Cn[TOKENS];
        copy_row(Bn, B_row + n * TOKENS);
        copy_row(Cn, C_row + n * TOKENS);
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
          const float An = A[(n0 + n) * CHANNELS + at.lane + HALF * j];
          float h = 0.f, g = 0.f;
#pragma unroll
          for (int i = 0; i < TOKENS; ++i) {
            a[n][j][i] = exp2_fast(d[j][i] * An);
            h = a[n][j][i] * h + du[j][i] * Bn[i];
          }
#pragma unroll
          for (int i = TOKENS - 1; i >= 0; --i) g = a[n][j][i] * (g + e[j][i] * Cn[i]);
          const int k = turn * PAIRS + pair_index(at.segment, n, j, at.lane);
          const float P = exp2_fast(sum[j] * An);
          pairs[k] = make_float2(P, h);
          g_pairs[k] = make_float2(P, g);
        }
      }
      __syncthreads();
      float part[GROUP];
#pragma unroll
      for (int n = 0; n < GROUP; ++n) {
        float Bn[TOKENS], Cn[TOKENS], v[2 * TOKENS] = {};  // v: this thread's share of dB and dC
        copy_row(Bn, B_row + n * TOKENS);
        copy_row(Cn, C_row + n * TOKENS);
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
          const int c = at.channel(j), at_state = (n0 + n) * CHANNELS + at.lane + HALF * j;
          const float An = A[at_state];
          float h = 0.f, g = g_in[at_state];
          if (c < p.d_inner && n0 + n < p.N) {
            if (chunk > 0) h = p.starts[at.start(p, chunk, n0 + n, c)];
            else if (p.initial) h = p.initial[at.state(p, n0 + n, c)];
          }
          for (int s = 0; s < at.segment; ++s) {  // 2. join
            const float2 pair = pairs[turn * PAIRS + pair_index(s, n, j, at.lane)];
            h = pair.x * h + pair.y;
          }
          for (int s = SEGMENTS - 1; s > at.segment; --s) {
            const float2 pair = g_pairs[turn * PAIRS + pair_index(s, n, j, at.lane)];
            g = pair.x * g + pair.y;
          }
          float before[TOKENS], dAn = 0.f;
#pragma unroll
          for (int i = 0; i < TOKENS; ++i) {  // 3. replay the states forwards,
            before[i] = h;
            h = a[n][j][i] * h + du[j][i] * Bn[i];
            v[TOKENS + i] += e[j][i] * h;
          }
#pragma unroll
          for (int i = TOKENS - 1; i >= 0; --i) {  // their gradients backwards
            g += e[j][i] * Cn[i];
            v[i] += g * du[j][i];
            gB[j][i] += g * Bn[i];
            g *= a[n][j][i];
            const float decay = g * before[i];  // gradient of delta_t A
            gA[j][i] += decay * An;
            dAn += decay * d[j][i];
          }
          dA[((n0 + n) * PER_THREAD + j) * THREADS + threadIdx.x] += dAn;
          if (at.segment == 0) g_out[at_state] = g;
        }
        part[n] = sums(v, at.lane);
      }
      const int t = t0 + at.lane % TOKENS;  // lanes 0..7 have dB of the segment's tokens, lanes 8..15 dC
      if (t < p.L) {
        const int64_t row = (int64_t(at.c0 / CHANNELS) * p.batch + at.b) * p.L + t;
        float* const out = (at.lane < TOKENS ? to.B : to.C) + row * p.N + n0;
        if (p.N % 4 == 0) *reinterpret_cast<float4*>(out) = make_float4(part[0], part[1], part[2], part[3]);
        else
#pragma unroll
          for (int n = 0; n < GROUP; ++n)
            if (n0 + n < p.N) out[n] = part[n];
      }
      __syncwarp();
    }
    read_tokens(du, u, p, at, t0);
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
      const float skip = p.D && at.channel(j) < p.d_inner ? p.D[at.channel(j)] : 0.f;
#pragma unroll
      for (int i = 0; i < TOKENS; ++i) {
        gA[j][i] = gA[j][i] * (1 / LOG2E) + gB[j][i] * du[j][i];
        gB[j][i] = gB[j][i] * d[j][i] + skip * e[j][i];
      }
    }
    write_tokens(grad_u, gB, p, at, t0);
    write_tokens(grad_delta, gA, p, at, t0);
  }
  __syncthreads();
  write_states(to.initial, carry + (p.chunks & 1) * carry_size, p, at);
  for (int k = threadIdx.x; k < (p.N + 1) * CHANNELS; k += THREADS) {
    const int n = k / CHANNELS, c = k % CHANNELS;
    const float* const from = n < p.N ? dA + n * PER_THREAD * THREADS : dD;
    float total = 0.f;
    for (int s = 0; s < SEGMENTS; ++s) total += from[c / HALF * THREADS + s * HALF + c % HALF];
    if (at.c0 + c < p.d_inner)
      (n < p.N ? to.A + (int64_t(at.b) * p.N + n) * p.d_inner : to.D + int64_t(at.b) * p.d_inner)[at.c0 + c] = total;
  }
}

template <typename Kernel, typename... Arguments>
cudaError_t launch(Kernel kernel, const Problem& p, bool backward, cudaStream_t stream, Arguments... arguments) {
  const int blocks = p.batch * ((p.d_inner + CHANNELS - 1) / CHANNELS), bytes = shared_floats(p.N, backward) * 4;
  if (blocks == 0) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, THREADS, bytes, stream>>>(p, arguments...);
  return cudaGetLastError();
}

}  // namespace

// The types of u, delta, B, C, y, dy, du, ddelta: float, or __nv_bfloat16 where `bf16`; contiguous but for the rows of B, C.
cudaError_t scan_forward_cuda(cudaStream_t stream, bool bf16, int batch, int L, int d_inner, int N, const void* u,
                              const void* delta, const float* A, const void* B, int64_t B_stride, const void* C,
                              int64_t C_stride, const float* D, const float* initial, void* y, float* final_state,
                              float* starts) {
  const Problem p{batch, L, d_inner, N, (L + CHUNK - 1) / CHUNK, B_stride, C_stride, A, D, initial, starts};
  const auto run = [&](auto* type) {
    using Io = std::remove_pointer_t<decltype(type)>;
    return launch(forward_kernel<Io>, p, false, stream, (const Io*)u, (const Io*)delta, (const Io*)B, (const Io*)C, (Io*)y,
                  final_state);
  };
  return bf16 ? run((__nv_bfloat16*)nullptr) : run((float*)nullptr);
}

// dA (batch, N, d_inner), dB and dC (blocks of 32 channels, batch, L, N), dD (batch, d_inner) are parts, to be summed over dim 0.
cudaError_t scan_backward_cuda(cudaStream_t stream, bool bf16, int batch, int L, int d_inner, int N, const void* dy,
                               const float* dfinal, const void* u, const void* delta, const float* A, const void* B,
                               int64_t B_stride, const void* C, int64_t C_stride, const float* D, const float* initial,
                               const float* starts, void* du, void* ddelta, float* dA, float* dB, float* dC, float* dD,
                               float* dinitial) {
  const Problem p{batch, L, d_inner, N, (L + CHUNK - 1) / CHUNK, B_stride, C_stride, A, D, initial, (float*)starts};
  const Gradients to{dA, dB, dC, dD, dinitial};
  const auto run = [&](auto* type) {
    using Io = std::remove_pointer_t<decltype(type)>;
    return launch(backward_kernel<Io>, p, true, stream, (const Io*)u, (const Io*)delta, (const Io*)B, (const Io*)C,
                  (const Io*)dy, dfinal, (Io*)du, (Io*)ddelta, to);
  };
  return bf16 ? run((__nv_bfloat16*)nullptr) : run((float*)nullptr);
}
