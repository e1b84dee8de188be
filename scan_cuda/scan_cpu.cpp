// The selective scan on the CPU, forward and backward (the formulas: __init__.py), in fp32; and the
// convolution.
//
// The recurrence runs over the tokens one by one, and in vectors over the channels: one vector holds the same
// state index n of LANES neighbouring channels. So u, delta and y are read and written as they lie in memory,
// B_t[n] and C_t[n] are one number for all lanes, and y_t = sum over n needs no sum across lanes.
//
// Backward, with g_t = dLoss/dh_t:   g_t = C_t dy_t + a_{t+1} g_{t+1}   where a_t = exp(delta_t A), from the
// last token to the first. It needs a_t and h_t of each token. The forward pass saves h before every chunk; a
// chunk's a and h are computed again, onto a tape that fits the L2 cache, so each exponential is computed
// once per pass.

#include "scan.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int LANES = __BIGGEST_ALIGNMENT__ / 4;  // floats in a register: 16 with AVX-512, 4 without AVX
// Vector types of gcc and clang: arithmetic works element by element. They may lie anywhere in a float array.
typedef float V __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int I __attribute__((vector_size(LANES * 4)));

constexpr float LOG2E = 1.44269504f;  // exp(x) = 2^(x log2 e); A is multiplied by it once

// 2^x to 1.7e-7 relative: 2^round(x) put together in the exponent bits, times a polynomial (minimax, p(0) =
// 1) for the rest in [-1/2, 1/2]. Below 2^-126.5 the result is 0, above 2^127.5 infinity.
inline V exp2(V x) {
  const V shifted = x + 12582912.f;  // 1.5 * 2^23: there floats are 1 apart, the last bits are round(x)
  const V f = x - (shifted - 12582912.f);
  I k;
  std::memcpy(&k, &shifted, sizeof k);
  k -= 0x4B400000 - 127;  // the bits of 1.5 * 2^23; 127: the bias of the exponent
  k = k < 0 ? I{} : k;
  k = (k > 255 ? I{} + 255 : k) << 23;
  V scale;
  std::memcpy(&scale, &k, sizeof k);
  V p = f * 1.32647272e-3f + 9.67151269e-3f;
  p = p * f + 5.55073374e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  return (p * f + 1.f) * scale;
}

// The vector that starts at from[at]; where only `width` < LANES elements are left, zeros follow.
inline V load(const void* from, int64_t at, int64_t width) {
  const float* x = static_cast<const float*>(from) + at;
  if (width >= LANES) return *reinterpret_cast<const V*>(x);
  V v = {};
  std::memcpy(&v, x, width * 4);
  return v;
}
inline void store(void* to, int64_t at, V v, int64_t width) {
  float* x = static_cast<float*>(to) + at;
  if (width >= LANES) *reinterpret_cast<V*>(x) = v;
  else std::memcpy(x, &v, width * 4);
}

// Exchange the lanes of x and y that are S apart. For S = 1 and four lanes
//     x0 x1 x2 x3 , y0 y1 y2 y3   ->   x0 y0 x2 y2 , x1 y1 x3 y3
template <int S, int... i>
inline void exchange(V& x, V& y, std::integer_sequence<int, i...>) {
  const V p = x, q = y;
#ifdef __clang__
  x = __builtin_shufflevector(p, q, (i & S ? LANES + i - S : i)...);
  y = __builtin_shufflevector(p, q, (i & S ? LANES + i : i + S)...);
#else
  x = __builtin_shuffle(p, q, I{(i & S ? LANES + i - S : i)...});
  y = __builtin_shuffle(p, q, I{(i & S ? LANES + i : i + S)...});
#endif
}
template <int S = 1>
inline V sums(V* v) {  // lane i of the result is the sum of the lanes of v[i]
  if constexpr (S == LANES) return v[0];
  else {
    for (int i = 0; i < LANES / S; i += 2) {
      exchange<S>(v[i], v[i + 1], std::make_integer_sequence<int, LANES>());
      v[i / 2] = v[i] + v[i + 1];
    }
    return sums<2 * S>(v);
  }
}
inline void add_sums(float* to, V* v, int N) {  // to[n] += the sum of the lanes of v[n]
  for (int n = 0; n < N; n += LANES) store(to, n, load(to, n, N - n) + sums(v + n), N - n);
}

const float* floats(const void* from) { return static_cast<const float*>(from); }
V state(const Scan& p, const float* from, int64_t b, int n, int64_t c0) {  // zeros if there is none
  return from ? load(from, (b * p.N + n) * p.d_inner + c0, p.d_inner - c0) : V{};
}

int64_t start(const Scan& p, int64_t b, int64_t chunk, int n) {  // of a state in `starts`
  return ((b * ((p.L - 1) / CHUNK) + chunk - 1) * p.N + n) * p.d_inner;
}

void forward(const Scan& p, int64_t b, int64_t c0) {  // channels c0 .. c0 + LANES of batch element b
  const int64_t width = p.d_inner - c0, N = p.N;
  struct { V A, h; } s[MAX_STATE];
  for (int n = 0; n < N; ++n) {
    s[n].A = load(p.A, n * p.d_inner + c0, width) * LOG2E;
    s[n].h = state(p, p.initial, b, n, c0);
  }
  const V D = p.D ? load(p.D, c0, width) : V{};
  for (int64_t t = 0; t < p.L; ++t) {
    if (t && t % CHUNK == 0)
      for (int n = 0; n < N; ++n) store(p.starts, start(p, b, t / CHUNK, n) + c0, s[n].h, width);
    const int64_t row = b * p.L + t, at = row * p.d_inner + c0;
    const float *B = floats(p.B) + row * p.B_stride, *C = floats(p.C) + row * p.C_stride;
    const V u = load(p.u, at, width), delta = load(p.delta, at, width), du = delta * u;
    V y = D * u;
    for (int n = 0; n < N; ++n) {
      s[n].h = exp2(delta * s[n].A) * s[n].h + du * B[n];
      y += s[n].h * C[n];
    }
    store(p.y, at, y, width);
  }
  for (int n = 0; n < N; ++n) store(p.final_state, (b * N + n) * p.d_inner + c0, s[n].h, width);
}

struct alignas(2 * LANES * sizeof(float)) Token { V a, h; };  // a_t and h_{t-1}, of one n

void backward(const Scan& p, int64_t b, int64_t c0, Token* tape) {
  const int64_t width = p.d_inner - c0, N = p.N;
  struct { V A, g, dA; } s[MAX_STATE];  // g: a_{t+1} g_{t+1}, from the token after
  V sum_B[MAX_STATE] = {}, sum_C[MAX_STATE] = {}, dD = {};
  for (int n = 0; n < N; ++n) {
    s[n].A = load(p.A, n * p.d_inner + c0, width) * LOG2E;
    s[n].g = state(p, p.dfinal, b, n, c0);
    s[n].dA = V{};
  }
  const V D = p.D ? load(p.D, c0, width) : V{};
  for (int64_t first = (p.L - 1) / CHUNK * CHUNK; first >= 0; first -= CHUNK) {
    const int T = std::min<int64_t>(CHUNK, p.L - first);
    for (int n = 0; n < N; ++n)
      tape[n].h = first ? load(p.starts, start(p, b, first / CHUNK, n) + c0, width)
                        : state(p, p.initial, b, n, c0);
    for (int t = 0; t < T; ++t) {
      const int64_t row = b * p.L + first + t, at = row * p.d_inner + c0;
      const float* B = floats(p.B) + row * p.B_stride;
      const V delta = load(p.delta, at, width), du = delta * load(p.u, at, width);
      Token *now = tape + t * N, *next = now + N;
      for (int n = 0; n < N; ++n) {
        now[n].a = exp2(delta * s[n].A);
        next[n].h = now[n].a * now[n].h + du * B[n];
      }
    }
    for (int t = T - 1; t >= 0; --t) {
      const int64_t row = b * p.L + first + t, at = row * p.d_inner + c0;
      const float *B = floats(p.B) + row * p.B_stride, *C = floats(p.C) + row * p.C_stride;
      const V u = load(p.u, at, width), delta = load(p.delta, at, width), dy = load(p.dy, at, width);
      const V du = delta * u;
      V gB = {}, gA = {};  // gradients of delta u, and of delta through delta A
      dD += dy * u;
      const Token *now = tape + t * N, *next = now + N;
      for (int n = 0; n < N; ++n) {
        const V g = s[n].g + dy * C[n];  // g_t
        s[n].g = g * now[n].a;
        const V decay = s[n].g * now[n].h;  // gradient of delta_t A
        sum_B[n] = g * du;
        sum_C[n] = dy * next[n].h;
        gB += g * B[n];
        gA += decay * s[n].A;
        s[n].dA += decay * delta;
      }
      store(p.du, at, gB * delta + D * dy, width);
      store(p.ddelta, at, gB * u + gA * (1 / LOG2E), width);
      add_sums(p.dB + row * N, sum_B, N);
      add_sums(p.dC + row * N, sum_C, N);
    }
  }
  for (int n = 0; n < N; ++n) {
    store(p.dA, (b * N + n) * p.d_inner + c0, s[n].dA, width);
    store(p.dinitial, (b * N + n) * p.d_inner + c0, s[n].g, width);
  }
  store(p.dD, b * p.d_inner + c0, dD, width);
}

// ---------------------------------------------------------------------------------------------
// The convolution before the scan: y_t = silu(z_t), z_t = bias + sum over k of weight_k x_{t+k}.

constexpr int WIDTH = 4;

V preactivation(const float* x, const float* weight, const float* bias, int64_t d, int64_t c) {
  V z = load(bias, c, d - c);
  for (int k = 0; k < WIDTH; ++k) z += load(weight, k * d + c, d - c) * load(x, k * d + c, d - c);
  return z;
}
V sigmoid(V z) { return 1.f / (1.f + exp2(z * -LOG2E)); }
void add(float* to, int64_t at, V v, int64_t width) { store(to, at, load(to, at, width) + v, width); }

}  // namespace

extern "C" {

const int scan_parts = 1, scan_channels = INT32_MAX, scan_takes_bf16 = 0;

int scan_forward(const Scan& p, void*) {
  const int64_t blocks = (p.d_inner + LANES - 1) / LANES;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.batch * blocks; ++i) forward(p, i / blocks, i % blocks * LANES);
  return 0;
}

int scan_backward(const Scan& p, void*) {
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<Token> tape((CHUNK + 1) * p.N);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < p.batch; ++b)  // all channels of it: dB and dC are sums over them
      for (int64_t c0 = 0; c0 < p.d_inner; c0 += LANES) backward(p, b, c0, tape.data());
  }
  return 0;
}

// x (batch, L + 3, d), y and dy (batch, L, d), weight (4, d). The gradients are zeros before the call; those
// of the weights, (batch, 4, d), and of the bias, (batch, d), are parts.
void conv_forward(int64_t batch, int64_t L, int64_t d, int64_t threads, float* y, const float* x,
                  const float* weight, const float* bias) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < L; ++t)
      for (int64_t c = 0; c < d; c += LANES) {
        const V z = preactivation(x + (b * (L + WIDTH - 1) + t) * d, weight, bias, d, c);
        store(y, (b * L + t) * d + c, z * sigmoid(z), d - c);
      }
}

void conv_backward(int64_t batch, int64_t L, int64_t d, int64_t threads, const float* dy, const float* x,
                   const float* weight, const float* bias, float* dx, float* dweight, float* dbias) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < L; ++t)
      for (int64_t c = 0; c < d; c += LANES) {
        const int64_t row = (b * (L + WIDTH - 1) + t) * d, width = d - c;
        const V z = preactivation(x + row, weight, bias, d, c), s = sigmoid(z);
        const V dz = load(dy, (b * L + t) * d + c, width) * s * (1.f + z * (1.f - s));
        add(dbias, b * d + c, dz, width);
        for (int k = 0; k < WIDTH; ++k) {
          add(dweight, (b * WIDTH + k) * d + c, dz * load(x, row + k * d + c, width), width);
          add(dx, row + k * d + c, dz * load(weight, k * d + c, width), width);
        }
      }
}

}
