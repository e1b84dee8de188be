// The selective scan and the convolution on the CPU, forward and backward, in fp32 (the formulas:
// __init__.py).
//
// The scan runs over the tokens one by one, and in vectors over the channels: a vector holds the same state
// index n of LANES neighbouring channels, for which B_t[n] and C_t[n] are one number. Backward, with g_t =
// dLoss/dh_t and a_t = exp(delta_t A), g_t = C_t dy_t + a_{t+1} g_{t+1}. The forward pass saves h before
// every chunk; a chunk's a and h are computed again, onto a tape that fits the L2 cache.

#include "scan.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int LANES = __BIGGEST_ALIGNMENT__ / 4;  // floats in a register: 16 with AVX-512, 4 without AVX
typedef float V __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int I __attribute__((vector_size(LANES * 4)));  // gcc and clang: arithmetic goes element by element

constexpr float LOG2E = 1.44269504f;  // exp(x) = 2^(x log2 e); A is multiplied by it once

// 2^x to 1.7e-7 relative: 2^round(x) put together in the exponent bits, times a polynomial (minimax, p(0) =
// 1) for the rest in [-1/2, 1/2]. Below 2^-126.5 the result is 0, above 2^127.5 infinity.
inline V exp2(V x) {
  const V shifted = x + 12582912.f;  // 1.5 * 2^23: there floats are 1 apart, the last bits are round(x)
  const V f = x - (shifted - 12582912.f);
  I k = (I)shifted - (0x4B400000 - 127);  // the bits of 1.5 * 2^23; 127: the bias of the exponent
  k = k < 0 ? I{} : k;
  k = (k > 255 ? I{} + 255 : k) << 23;
  V p = f * 1.32647272e-3f + 9.67151269e-3f;
  p = p * f + 5.55073374e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  return (p * f + 1.f) * (V)k;
}

// The vector that starts at from[at]; where only `width` < LANES elements are left, zeros follow.
inline V load(const void* from, int64_t at, int64_t width) {
  const float* x = static_cast<const float*>(from) + at;
  if (width >= LANES) return *reinterpret_cast<const V*>(x);
  V v = {};
  if (width > 0) std::memcpy(&v, x, width * 4);
  return v;
}
inline void store(void* to, int64_t at, V v, int64_t width) {
  float* x = static_cast<float*>(to) + at;
  if (width >= LANES) *reinterpret_cast<V*>(x) = v;
  else if (width > 0) std::memcpy(x, &v, width * 4);
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
  for (int n = 0; n < N; n += LANES) {
    const V sum = sums(v + n);
    if (N - n >= LANES) store(to, n, load(to, n, LANES) + sum, LANES);
    else for (int i = 0; i < N - n; ++i) to[n + i] += sum[i];
  }
}

const float* row_of(const void* from, int64_t at) { return static_cast<const float*>(from) + at; }
int64_t start(const Scan& p, int64_t b, int64_t chunk, int n) {  // a row of `starts`
  return (b * ((p.L - 1) / CHUNK) + chunk - 1) * p.N + n;
}

struct Channels {  // LANES neighbouring ones, in rows of d_inner
  int64_t d_inner, first;
  V read(const void* from, int64_t row) const { return load(from, row * d_inner + first, d_inner - first); }
  V read_if(const void* from, int64_t row) const { return from ? read(from, row) : V{}; }
  void write(void* to, int64_t row, V v) const { store(to, row * d_inner + first, v, d_inner - first); }
};

void forward(const Scan& p, int64_t b, int64_t c0) {
  const Channels at{p.d_inner, c0};
  const int N = p.N;
  struct { V A, h; } s[MAX_STATE];
  for (int n = 0; n < N; ++n) s[n] = {at.read(p.A, n) * LOG2E, at.read_if(p.initial, b * N + n)};
  const V D = at.read_if(p.D, 0);
  for (int64_t t = 0; t < p.L; ++t) {
    if (t && t % CHUNK == 0)
      for (int n = 0; n < N; ++n) at.write(p.starts, start(p, b, t / CHUNK, n), s[n].h);
    const int64_t row = b * p.L + t;
    const float *B = row_of(p.B, row * p.B_stride), *C = row_of(p.C, row * p.C_stride);
    const V u = at.read(p.u, row), delta = at.read(p.delta, row), du = delta * u;
    V y = D * u;
    for (int n = 0; n < N; ++n) {
      s[n].h = exp2(delta * s[n].A) * s[n].h + du * B[n];
      y += s[n].h * C[n];
    }
    at.write(p.y, row, y);
  }
  for (int n = 0; n < N; ++n) at.write(p.final_state, b * N + n, s[n].h);
}

constexpr int J = 2;  // vectors of channels that share B_t[n], C_t[n] and the sums for their gradients
struct alignas(2 * LANES * sizeof(float)) Token { V a[J], h[J]; };  // a_t and h_{t-1}, of one n

void backward(const Scan& p, int64_t b, int64_t c0, Token* tape) {
  const Channels at[J] = {{p.d_inner, c0}, {p.d_inner, c0 + LANES}};
  const int N = p.N;
  struct { V A[J], g[J], dA[J]; } s[MAX_STATE];  // g: a_{t+1} g_{t+1}, from the token after
  V sum_B[MAX_STATE] = {}, sum_C[MAX_STATE] = {}, dD[J] = {}, D[J];
  for (int j = 0; j < J; ++j) D[j] = at[j].read_if(p.D, 0);
  for (int n = 0; n < N; ++n)
    for (int j = 0; j < J; ++j) {
      s[n].A[j] = at[j].read(p.A, n) * LOG2E;
      s[n].g[j] = at[j].read_if(p.dfinal, b * N + n);
      s[n].dA[j] = V{};
    }
  for (int64_t first = (p.L - 1) / CHUNK * CHUNK; first >= 0; first -= CHUNK) {
    const int T = std::min<int64_t>(CHUNK, p.L - first);
    for (int n = 0; n < N; ++n)
      for (int j = 0; j < J; ++j)
        tape[n].h[j] = first ? at[j].read(p.starts, start(p, b, first / CHUNK, n))
                             : at[j].read_if(p.initial, b * N + n);
    for (int t = 0; t < T; ++t) {
      const int64_t row = b * p.L + first + t;
      const float* B = row_of(p.B, row * p.B_stride);
      Token *now = tape + t * N, *next = now + N;
      V delta[J], du[J];
      for (int j = 0; j < J; ++j)
        delta[j] = at[j].read(p.delta, row), du[j] = delta[j] * at[j].read(p.u, row);
      for (int n = 0; n < N; ++n)
        for (int j = 0; j < J; ++j) {
          now[n].a[j] = exp2(delta[j] * s[n].A[j]);
          next[n].h[j] = now[n].a[j] * now[n].h[j] + du[j] * B[n];
        }
    }
    for (int t = T - 1; t >= 0; --t) {
      const int64_t row = b * p.L + first + t;
      const float *B = row_of(p.B, row * p.B_stride), *C = row_of(p.C, row * p.C_stride);
      const Token *now = tape + t * N, *next = now + N;
      V u[J], delta[J], dy[J], gB[J] = {}, gA[J] = {};  // gradients of delta u, and of delta through delta A
      for (int j = 0; j < J; ++j) {
        u[j] = at[j].read(p.u, row), delta[j] = at[j].read(p.delta, row), dy[j] = at[j].read(p.dy, row);
        dD[j] += dy[j] * u[j];
      }
      for (int n = 0; n < N; ++n) {
        V dB = {}, dC = {};
        for (int j = 0; j < J; ++j) {
          const V g = s[n].g[j] + dy[j] * C[n];  // g_t
          s[n].g[j] = g * now[n].a[j];
          const V decay = s[n].g[j] * now[n].h[j];  // gradient of delta_t A
          dB += g * (delta[j] * u[j]);
          dC += dy[j] * next[n].h[j];
          gB[j] += g * B[n];
          gA[j] += decay * s[n].A[j];
          s[n].dA[j] += decay * delta[j];
        }
        sum_B[n] = dB, sum_C[n] = dC;
      }
      for (int j = 0; j < J; ++j) {
        at[j].write(p.du, row, gB[j] * delta[j] + D[j] * dy[j]);
        at[j].write(p.ddelta, row, gB[j] * u[j] + gA[j] * (1 / LOG2E));
      }
      add_sums(p.dB + row * N, sum_B, N);
      add_sums(p.dC + row * N, sum_C, N);
    }
  }
  for (int j = 0; j < J; ++j) {
    for (int n = 0; n < N; ++n) {
      at[j].write(p.dA, b * N + n, s[n].dA[j]);
      at[j].write(p.dinitial, b * N + n, s[n].g[j]);
    }
    at[j].write(p.dD, b, dD[j]);
  }
}

// ---------------------------------------------------------------------------------------------
// The convolution before the scan: y_t = silu(z_t), z_t = bias + sum over k of weight_k x_{t+k}.

constexpr int WIDTH = 4;

V sigmoid(V z) { return 1.f / (1.f + exp2(z * -LOG2E)); }

struct Window {  // the inputs of z_t: rows of x, before the first those of the initial state
  const float* x[WIDTH];
  Window(const float* in, const float* initial, int64_t b, int64_t t, int64_t L, int64_t d, int64_t stride) {
    for (int64_t k = 0, s = t - WIDTH + 1; k < WIDTH; ++k, ++s)
      x[k] = s < 0 ? initial + (b * (WIDTH - 1) + s + WIDTH - 1) * d : in + (b * L + s) * stride;
  }
  V z(const float* weight, const float* bias, int64_t d, int64_t c) const {
    V z = load(bias, c, d - c);
    for (int k = 0; k < WIDTH; ++k) z += load(weight, k * d + c, d - c) * load(x[k], c, d - c);
    return z;
  }
};

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
      for (int64_t c0 = 0; c0 < p.d_inner; c0 += J * LANES) backward(p, b, c0, tape.data());
  }
  return 0;
}

// x (batch, L, d), its rows `stride` apart, y, dy, dx (batch, L, d), weight (4, d), initial, dinitial (batch,
// 3, d); dweight (batch, 4, d) and dbias (batch, d) are parts.
void conv_forward(int64_t batch, int64_t L, int64_t d, int64_t stride, int64_t threads, float* y,
                  const float* x, const float* weight, const float* bias, const float* initial) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < batch * L; ++row) {
    const Window at(x, initial, row / L, row % L, L, d, stride);
    for (int64_t c = 0; c < d; c += LANES) {
      const V z = at.z(weight, bias, d, c);
      store(y, row * d + c, z * sigmoid(z), d - c);
    }
  }
}

void conv_backward(int64_t batch, int64_t L, int64_t d, int64_t stride, int64_t threads, const float* dy,
                   const float* x, const float* weight, const float* bias, const float* initial, float* dx,
                   float* dweight, float* dbias, float* dinitial) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < d; c += LANES) {
      const int64_t width = d - c;
      V dz[WIDTH] = {}, dw[WIDTH] = {}, db = {};  // dz[k]: gradient of z_{t+k}
      for (int64_t t = L - 1; t > -WIDTH; --t) {
        for (int k = WIDTH - 1; k > 0; --k) dz[k] = dz[k - 1];
        dz[0] = V{};  // before the first token there is only the initial state
        if (t >= 0) {
          const Window at(x, initial, b, t, L, d, stride);
          const V z = at.z(weight, bias, d, c), s = sigmoid(z);
          dz[0] = load(dy, (b * L + t) * d + c, width) * s * (1.f + z * (1.f - s));
          db += dz[0];
          for (int k = 0; k < WIDTH; ++k) dw[k] += dz[0] * load(at.x[k], c, width);
        }
        V sum = {};
        for (int k = 0; k < WIDTH; ++k) sum += load(weight, (WIDTH - 1 - k) * d + c, width) * dz[k];
        store(t < 0 ? dinitial + (b * (WIDTH - 1) + t + WIDTH - 1) * d : dx + (b * L + t) * d, c, sum, width);
      }
      for (int k = 0; k < WIDTH; ++k) store(dweight, (b * WIDTH + k) * d + c, dw[k], width);
      store(dbias, b * d + c, db, width);
    }
}
}
