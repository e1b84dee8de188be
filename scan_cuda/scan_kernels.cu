// The selective scan on the GPU, forward and backward (the formulas: __init__.py), twice: first
// plainly, one thread walking through the sequence of one channel, to be read and to compare with;
// then in parallel over the sequence, which is what runs. Without CUDA, emulate.h takes its place.

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#else
#include "emulate.h"
#endif

#include "scan.h"

extern __shared__ float4 shared_memory[];

namespace {

using Bf16 = __nv_bfloat16;
// Io, float or Bf16, is the type of u, delta, B, C, dy, y, du and ddelta in memory. All else is
// float.
__device__ float value(float x) { return x; }
__device__ float value(Bf16 x) { return __bfloat162float(x); }
__device__ void assign(float& to, float x) { to = x; }
__device__ void assign(Bf16& to, float x) { to = __float2bfloat16(x); }
template <typename Io>
__device__ float read(const void* from, int64_t i) {
  return value(__ldg(static_cast<const Io*>(from) + i));
}
template <typename Io>
__device__ void write(void* to, int64_t i, float x) { assign(static_cast<Io*>(to)[i], x); }

// Where the channels of state n of batch element b lie; in `starts`, those of the state before this
// chunk.
__device__ int64_t state(const Scan& p, int64_t b, int n) { return (b * p.N + n) * p.d_inner; }
__device__ int64_t start(const Scan& p, int64_t b, int64_t chunk, int n) {
  return ((b * ((p.L - 1) / CHUNK) + chunk - 1) * p.N + n) * p.d_inner;
}
__device__ float state_before(const Scan& p, int64_t b, int64_t chunk, int n, int64_t c) {
  if (chunk > 0) return p.starts[start(p, b, chunk, n) + c];
  return p.initial[state(p, b, n) + c];
}

// -------------------------------------------------------------------------------------------------
// 1. Plain: a thread takes channel c of batch element b from the first token to the last, and back.

template <typename Io>
__global__ void walk(Scan p) {
  const int64_t b = blockIdx.x, c = blockIdx.y * blockDim.x + threadIdx.x;
  if (c >= p.d_inner) return;
  float h[MAX_STATE];
  for (int n = 0; n < p.N; ++n) h[n] = state_before(p, b, 0, n, c);
  for (int64_t t = 0; t < p.L; ++t) {
    const int64_t row = b * p.L + t;
    const float u = read<Io>(p.u, row * p.d_inner + c);
    const float delta = read<Io>(p.delta, row * p.d_inner + c);
    float y = p.D[c] * u;
    for (int n = 0; n < p.N; ++n) {
      if (t > 0 && t % CHUNK == 0) p.starts[start(p, b, t / CHUNK, n) + c] = h[n];
      const float a = __expf(delta * p.A[n * p.d_inner + c]);
      h[n] = a * h[n] + delta * u * read<Io>(p.B, row * p.N + n);
      y += h[n] * read<Io>(p.C, row * p.N + n);
    }
    write<Io>(p.y, row * p.d_inner + c, y);
  }
  for (int n = 0; n < p.N; ++n) p.final_state[state(p, b, n) + c] = h[n];
}

// g_t = dLoss/dh_t comes from behind: g_t = C_t dy_t + a_{t+1} g_{t+1}, with a_t = exp(delta_t A).
// The states of a chunk are computed again from the one saved before it. atomicAdd where threads
// share a sum.
template <typename Io>
__global__ void walk_back(Scan p) {
  const int64_t b = blockIdx.x, c = blockIdx.y * blockDim.x + threadIdx.x;
  if (c >= p.d_inner) return;
  float g[MAX_STATE], h[CHUNK + 1][MAX_STATE];
  for (int n = 0; n < p.N; ++n) g[n] = p.dfinal[state(p, b, n) + c];
  for (int64_t chunk = (p.L - 1) / CHUNK; chunk >= 0; --chunk) {
    const int64_t first = b * p.L + chunk * CHUNK, last = min(first + CHUNK, (b + 1) * p.L) - 1;
    for (int n = 0; n < p.N; ++n) h[0][n] = state_before(p, b, chunk, n, c);
    for (int64_t row = first; row <= last; ++row) {
      const float u = read<Io>(p.u, row * p.d_inner + c);
      const float delta = read<Io>(p.delta, row * p.d_inner + c);
      for (int n = 0; n < p.N; ++n)
        h[row - first + 1][n] = __expf(delta * p.A[n * p.d_inner + c]) * h[row - first][n]
                                + delta * u * read<Io>(p.B, row * p.N + n);
    }
    for (int64_t row = last; row >= first; --row) {
      const float u = read<Io>(p.u, row * p.d_inner + c);
      const float delta = read<Io>(p.delta, row * p.d_inner + c);
      const float dy = read<Io>(p.dy, row * p.d_inner + c);
      const float *before = h[row - first], *now = h[row - first + 1];
      float gB = 0.f, gA = 0.f;  // gradients of delta u, and of delta through delta A
      for (int n = 0; n < p.N; ++n) {
        const float A = p.A[n * p.d_inner + c];
        g[n] += dy * read<Io>(p.C, row * p.N + n);  // g_t
        gB += g[n] * read<Io>(p.B, row * p.N + n);
        atomicAdd(p.dB + row * p.N + n, g[n] * delta * u);
        atomicAdd(p.dC + row * p.N + n, dy * now[n]);
        g[n] *= __expf(delta * A);  // a_t g_t
        gA += g[n] * before[n] * A;
        atomicAdd(p.dA + n * p.d_inner + c, g[n] * before[n] * delta);
      }
      atomicAdd(p.dD + c, dy * u);
      write<Io>(p.du, row * p.d_inner + c, gB * delta + p.D[c] * dy);
      write<Io>(p.ddelta, row * p.d_inner + c, gB * u + gA);
    }
  }
  for (int n = 0; n < p.N; ++n) p.dinitial[state(p, b, n) + c] = g[n];
}

// -------------------------------------------------------------------------------------------------
// 2. Parallel over the sequence.
//
// A token maps the state h to a h + b with a = exp(delta A), b = delta u B. Two tokens in a row are
// again such a map,   (a1, b1) then (a2, b2)  =  (a1 a2, a2 b1 + b2),   and this joining is
// associative: pairs may be joined in any grouping as long as they stay in order. So a long
// sequence is cut into segments; each is reduced to one pair by itself, in parallel, and only these
// pairs are joined one after the other. Eight tokens, four segments:
//
//     tokens     (a,b)0 (a,b)1 | (a,b)2 (a,b)3 | (a,b)4 (a,b)5 | (a,b)6 (a,b)7
//     1. reduce      P0,H0     |     P1,H1     |     P2,H2     |     P3,H3       from h = 0 (*)
//     2. join                  | H0            | P1 H0 + H1    | P2 (..) + H2
//     3. replay    h0     h1   |   h2     h3   |   h4     h5   |   h6     h7     from the start
//
// (*) The first segment starts from the state before it.
//
// Steps 1 and 3 touch each token once, step 2 one pair per segment: the work is proportional to L.
// The exponentials of step 1 stay in registers for step 3, since nvcc unrolls all loops of constant
// length.
//
// A block takes CHANNELS neighbouring channels of one batch element through the sequence, in chunks
// of SEGMENTS x TOKENS tokens. A warp takes a segment, a lane of it one channel: what a warp reads
// of u, delta and dy is contiguous, and B_t[n], C_t[n] are one address for all its lanes. The
// states n come one after the other; the pairs of n and n + 1 are in different buffers, so each n
// needs a single __syncthreads.
//
// Backward takes the chunks from last to first with the same steps in both directions: the states
// forwards, from the one saved before each chunk, their gradients g backwards.

constexpr int SEGMENTS = CUDA_PARTS, TOKENS = CHUNK / SEGMENTS;
constexpr int CHANNELS = CUDA_CHANNELS, THREADS = SEGMENTS * CHANNELS;

struct Shared {  // 16 KiB: every card has as much for a block
  float2 pairs[2][SEGMENTS][CHANNELS];    // (P, H)
  float2 g_pairs[2][SEGMENTS][CHANNELS];  // the same of g, from a segment's last token to its first
  float carry[MAX_STATE][CHANNELS];       // h; backwards a_{t+1} g_{t+1}: from chunk to chunk
};

struct Place {  // of a thread
  int lane = threadIdx.x % CHANNELS, segment = threadIdx.x / CHANNELS;
  int64_t b = blockIdx.x, c = blockIdx.y * CHANNELS + lane;
  bool exists;    // is there such a channel? If not, c is the last one: read once more, not written
  int64_t row;    // the segment's first token
  int count = 0;  // its tokens: TOKENS, fewer at the end of the sequence, none (or less) past it
  __device__ Place(const Scan& p) : exists(c < p.d_inner) { c = min(c, p.d_inner - 1); }
  __device__ void enter(const Scan& p, int64_t chunk) {
    const int64_t t = chunk * CHUNK + segment * TOKENS;
    row = b * p.L + t;
    count = min(p.L - t, int64_t(TOKENS));
  }
};

// This thread's tokens of u, delta or dy; zeros past the end: a = 1 and b = 0 leave the state as it
// is.
template <typename Io>
__device__ void read_tokens(float (&to)[TOKENS], const void* from, const Scan& p, const Place& at) {
  for (int i = 0; i < TOKENS; ++i)
    to[i] = i < at.count ? read<Io>(from, (at.row + i) * p.d_inner + at.c) : 0.f;
}
// B[n] or C[n] of these tokens. Past the end the last one once more: what is multiplied by it is
// zero.
template <typename Io>
__device__ void read_column(float (&to)[TOKENS], const void* from, int64_t N, int n,
                            const Place& at) {
  for (int i = 0; i < TOKENS; ++i) to[i] = read<Io>(from, (at.row + min(i, at.count - 1)) * N + n);
}

template <typename Io>
__global__ void __launch_bounds__(THREADS) forward(Scan p) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  Place at(p);
  const float D = p.D[at.c];

  for (int n = at.segment; n < p.N; n += SEGMENTS)
    shared.carry[n][at.lane] = state_before(p, at.b, 0, n, at.c);
  for (int64_t chunk = 0; chunk * CHUNK < p.L; ++chunk) {
    __syncthreads();  // carry is written, the pairs of the chunk before have been read
    at.enter(p, chunk);
    float delta[TOKENS], x[TOKENS], y[TOKENS];  // x: u, then delta u
    read_tokens<Io>(delta, p.delta, p, at);
    read_tokens<Io>(x, p.u, p, at);
    for (int i = 0; i < TOKENS; ++i) y[i] = D * x[i], x[i] *= delta[i];
    for (int n = 0; n < p.N; ++n) {
      auto& pairs = shared.pairs[n % 2];  // [SEGMENTS][CHANNELS]
      float a[TOKENS], B[TOKENS], C[TOKENS], P = 1.f;
      float start_h = at.segment == 0 ? shared.carry[n][at.lane] : 0.f, h = start_h;
      if (chunk > 0 && at.segment == 0 && at.exists) p.starts[start(p, at.b, chunk, n) + at.c] = h;
      if (at.count > 0) {  // 1. reduce
        const float A = p.A[n * p.d_inner + at.c];
        read_column<Io>(B, p.B, p.N, n, at);
        for (int i = 0; i < TOKENS; ++i) {
          a[i] = __expf(delta[i] * A);
          P *= a[i];
          h = a[i] * h + x[i] * B[i];
        }
      }
      pairs[at.segment][at.lane] = make_float2(P, h);
      __syncthreads();
      for (int s = 0; s < SEGMENTS - 1; ++s)  // 2. join
        if (s < at.segment) start_h = pairs[s][at.lane].x * start_h + pairs[s][at.lane].y;
      h = start_h;
      if (at.count > 0) {  // 3. replay
        read_column<Io>(C, p.C, p.N, n, at);
        for (int i = 0; i < TOKENS; ++i) {
          h = a[i] * h + x[i] * B[i];
          y[i] += C[i] * h;
        }
      }
      if (at.segment == SEGMENTS - 1) shared.carry[n][at.lane] = h;
    }
    for (int i = 0; i < TOKENS; ++i)
      if (i < at.count && at.exists) write<Io>(p.y, (at.row + i) * p.d_inner + at.c, y[i]);
  }
  __syncthreads();
  for (int n = at.segment; n < p.N; n += SEGMENTS)
    if (at.exists) p.final_state[state(p, at.b, n) + at.c] = shared.carry[n][at.lane];
}

// v[k] summed over the warp, for all 16 k at once: lanes k and k + 16 get the sum of v[k]. Each
// round hands half of what is left to another lane and adds what comes from there: 16 shuffles,
// where 16 separate sums take 80.
__device__ float sums(float (&v)[2 * TOKENS], int lane) {
  for (int s = TOKENS; s > 0; s /= 2)
    for (int k = 0; k < s; ++k) {
      const float give = lane & s ? v[k] : v[k + s], keep = lane & s ? v[k + s] : v[k];
      v[k] = keep + __shfl_xor_sync(0xffffffffu, give, s);
    }
  return v[0] + __shfl_xor_sync(0xffffffffu, v[0], 2 * TOKENS);
}

template <typename Io>
__global__ void __launch_bounds__(THREADS, 2) backward(Scan p) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  Place at(p);
  const float D = p.D[at.c];
  float dD = 0.f;

  for (int n = at.segment; n < p.N; n += SEGMENTS)
    shared.carry[n][at.lane] = p.dfinal[state(p, at.b, n) + at.c];
  for (int64_t chunk = (p.L - 1) / CHUNK; chunk >= 0; --chunk) {
    __syncthreads();
    at.enter(p, chunk);
    float delta[TOKENS], x[TOKENS], dy[TOKENS];
    float gB[TOKENS] = {}, gA[TOKENS] = {};  // gradients of delta u, and of delta through delta A
    read_tokens<Io>(delta, p.delta, p, at);
    read_tokens<Io>(x, p.u, p, at);
    read_tokens<Io>(dy, p.dy, p, at);
    for (int i = 0; i < TOKENS; ++i) dD += dy[i] * x[i], x[i] *= delta[i];
    for (int n = 0; n < p.N; ++n) {
      auto &pairs = shared.pairs[n % 2], &g_pairs = shared.g_pairs[n % 2];  // [SEGMENTS][CHANNELS]
      const float A = p.A[n * p.d_inner + at.c];
      float a[TOKENS], B[TOKENS], C[TOKENS], P = 1.f;
      float start_h = at.segment == 0 ? state_before(p, at.b, chunk, n, at.c) : 0.f, h = start_h;
      float end_g = at.segment == SEGMENTS - 1 ? shared.carry[n][at.lane] : 0.f, g = end_g;
      if (at.count > 0) {  // 1. reduce, in both directions
        read_column<Io>(B, p.B, p.N, n, at);
        read_column<Io>(C, p.C, p.N, n, at);
        for (int i = 0; i < TOKENS; ++i) {
          a[i] = __expf(delta[i] * A);
          P *= a[i];
          h = a[i] * h + x[i] * B[i];
        }
        for (int i = TOKENS - 1; i >= 0; --i) g = a[i] * (g + dy[i] * C[i]);
      }
      pairs[at.segment][at.lane] = make_float2(P, h);
      g_pairs[at.segment][at.lane] = make_float2(P, g);
      __syncthreads();
      for (int s = 0; s < SEGMENTS - 1; ++s)  // 2. join
        if (s < at.segment) start_h = pairs[s][at.lane].x * start_h + pairs[s][at.lane].y;
      for (int s = SEGMENTS - 1; s > 0; --s)
        if (s > at.segment) end_g = g_pairs[s][at.lane].x * end_g + g_pairs[s][at.lane].y;
      h = start_h, g = end_g;
      if (at.count > 0) {
        float before[TOKENS], v[2 * TOKENS], dA = 0.f;  // v: this channel's share of dB and dC
        for (int i = 0; i < TOKENS; ++i) {  // 3. replay the states forwards,
          before[i] = h;
          h = a[i] * h + x[i] * B[i];
          v[TOKENS + i] = at.exists ? dy[i] * h : 0.f;
        }
        for (int i = TOKENS - 1; i >= 0; --i) {  // their gradients backwards
          g += dy[i] * C[i];
          v[i] = at.exists ? g * x[i] : 0.f;
          gB[i] += g * B[i];
          g *= a[i];
          const float decay = g * before[i];  // gradient of delta_t A
          gA[i] += decay * A;
          dA += decay * delta[i];
        }
        if (at.exists) p.dA[((at.b * SEGMENTS + at.segment) * p.N + n) * p.d_inner + at.c] += dA;
        // Lanes 0..7 have dB of the segment's tokens, lanes 8..15 dC.
        const float sum = sums(v, at.lane);
        const int64_t row = blockIdx.y * p.batch * p.L + at.row + at.lane % TOKENS;
        float* const to = at.lane < TOKENS ? p.dB : p.dC;
        if (at.lane < 2 * TOKENS && at.lane % TOKENS < at.count) to[row * p.N + n] = sum;
      }
      if (at.segment == 0) shared.carry[n][at.lane] = g;
    }
    for (int i = 0; i < TOKENS; ++i)
      if (i < at.count && at.exists) {
        const int64_t k = (at.row + i) * p.d_inner + at.c;
        write<Io>(p.du, k, gB[i] * delta[i] + D * dy[i]);
        write<Io>(p.ddelta, k, gB[i] * read<Io>(p.u, k) + gA[i]);
      }
  }
  __syncthreads();
  for (int n = at.segment; n < p.N; n += SEGMENTS)
    if (at.exists) p.dinitial[state(p, at.b, n) + at.c] = shared.carry[n][at.lane];
  if (at.exists) p.dD[(at.b * SEGMENTS + at.segment) * p.d_inner + at.c] = dD;
}

int launch(void (*fp32)(Scan), void (*bf16)(Scan), int threads, const Scan& p, void* stream) {
  const dim3 grid(p.batch, (p.d_inner + CHANNELS - 1) / CHANNELS);
  const auto kernel = p.bf16 ? bf16 : fp32;
#ifdef __CUDACC__
  kernel<<<grid, threads, sizeof(Shared), static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
#else
  return emulate(kernel, p, grid, threads);
#endif
}

}  // namespace

extern "C" {
int scan_forward(const Scan& p, void* stream) {
  return launch(forward<float>, forward<Bf16>, THREADS, p, stream);
}
int scan_backward(const Scan& p, void* stream) {
  return launch(backward<float>, backward<Bf16>, THREADS, p, stream);
}
int plain_forward(const Scan& p, void* stream) {
  return launch(walk<float>, walk<Bf16>, 32, p, stream);
}
int plain_backward(const Scan& p, void* stream) {
  return launch(walk_back<float>, walk_back<Bf16>, 32, p, stream);
}
}
