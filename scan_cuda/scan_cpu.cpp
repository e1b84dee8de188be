// The selective scan and the convolution on the CPU, forward and backward, in fp32 (the formulas:
// __init__.py), and at the end the operators that torch calls.
//
// The scan runs over the tokens one by one, and in vectors over the channels: a vector holds the
// same state index n of LANES neighbouring channels, for which B_t[n] and C_t[n] are one number.
// Backward, with g_t = dLoss/dh_t and a_t = exp(delta_t A), g_t = C_t dy_t + a_{t+1} g_{t+1}. The
// forward pass saves h before every chunk; a chunk's a and h are computed again, onto a tape that
// fits the L2 cache.

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "operators.h"

namespace {

constexpr int LANES = __BIGGEST_ALIGNMENT__ / 4;  // floats in a register: 16 with AVX-512
typedef float V __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int I __attribute__((vector_size(LANES * 4)));  // arithmetic goes element by element

constexpr float LOG2E = 1.44269504f;  // exp(x) = 2^(x log2 e); A is multiplied by it once

// 2^x to 1.7e-7 relative: 2^round(x) put together in the exponent bits, times a polynomial
// (minimax, p(0) = 1) for the rest in [-1/2, 1/2]. Below 2^-126.5 the result is 0, above 2^127.5
// infinity.
inline V exp2(V x) {
  // 1.5 * 2^23: there floats are 1 apart, the last bits are round(x)
  const V shifted = x + 12582912.f;
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
  V read(const void* from, int64_t row) const {
    return load(from, row * d_inner + first, d_inner - first);
  }
  void write(void* to, int64_t row, V v) const {
    store(to, row * d_inner + first, v, d_inner - first);
  }
};

void walk(const Scan& p, int64_t b, int64_t c0) {
  const Channels at{p.d_inner, c0};
  const int N = p.N;
  struct { V A, h; } s[MAX_STATE];
  for (int n = 0; n < N; ++n) s[n] = {at.read(p.A, n) * LOG2E, at.read(p.initial, b * N + n)};
  const V D = at.read(p.D, 0);
  for (int64_t t = 0; t < p.L; ++t) {
    if (t && t % CHUNK == 0)
      for (int n = 0; n < N; ++n) at.write(p.starts, start(p, b, t / CHUNK, n), s[n].h);
    const int64_t row = b * p.L + t;
    const float *B = row_of(p.B, row * N), *C = row_of(p.C, row * N);
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

constexpr int J = 2;  // vectors of channels that share B_t[n], C_t[n] and sums for their gradients
struct alignas(2 * LANES * sizeof(float)) Token { V a[J], h[J]; };  // a_t and h_{t-1}, of one n

void walk_back(const Scan& p, int64_t b, int64_t c0, Token* tape) {
  const Channels at[J] = {{p.d_inner, c0}, {p.d_inner, c0 + LANES}};
  const int N = p.N;
  struct { V A[J], g[J], dA[J]; } s[MAX_STATE];  // g: a_{t+1} g_{t+1}, from the token after
  V sum_B[MAX_STATE] = {}, sum_C[MAX_STATE] = {}, dD[J] = {}, D[J];
  for (int j = 0; j < J; ++j) D[j] = at[j].read(p.D, 0);
  for (int n = 0; n < N; ++n)
    for (int j = 0; j < J; ++j) {
      s[n].A[j] = at[j].read(p.A, n) * LOG2E;
      s[n].g[j] = at[j].read(p.dfinal, b * N + n);
      s[n].dA[j] = V{};
    }
  for (int64_t first = (p.L - 1) / CHUNK * CHUNK; first >= 0; first -= CHUNK) {
    const int T = std::min<int64_t>(CHUNK, p.L - first);
    for (int n = 0; n < N; ++n)
      for (int j = 0; j < J; ++j)
        tape[n].h[j] = first ? at[j].read(p.starts, start(p, b, first / CHUNK, n))
                             : at[j].read(p.initial, b * N + n);
    for (int t = 0; t < T; ++t) {
      const int64_t row = b * p.L + first + t;
      const float* B = row_of(p.B, row * N);
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
      const float *B = row_of(p.B, row * N), *C = row_of(p.C, row * N);
      const Token *now = tape + t * N, *next = now + N;
      V u[J], delta[J], dy[J];
      V gB[J] = {}, gA[J] = {};  // gradients of delta u, and of delta through delta A
      for (int j = 0; j < J; ++j) {
        u[j] = at[j].read(p.u, row);
        delta[j] = at[j].read(p.delta, row);
        dy[j] = at[j].read(p.dy, row);
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

// -------------------------------------------------------------------------------------------------
// The convolution before the scan: y_t = silu(z_t), z_t = bias + sum over k of weight_k x_{t+k}.

constexpr int WIDTH = 4;

V sigmoid(V z) { return 1.f / (1.f + exp2(z * -LOG2E)); }

// x, y, dy, dx (batch, L, d): contiguous, but tokens of x may be slices of wider ones, its rows
// lying at b * x_batch + t * x_token. weight, dweight (4, d); bias, dbias (d,); initial, dinitial
// (batch, 3, d). dweight and dbias are parts, (batch, 4, d) and (batch, d).
struct Conv {
  int64_t batch, L, d, x_batch, x_token;
  const float *x, *weight, *bias, *initial, *dy;
  float *y, *dx, *dweight, *dbias, *dinitial;
};

struct Window {  // the inputs of z_t: rows of x, before the first those of the initial state
  const float* x[WIDTH];
  Window(const Conv& p, int64_t b, int64_t t) {
    for (int64_t k = 0, s = t - WIDTH + 1; k < WIDTH; ++k, ++s)
      x[k] = s < 0 ? p.initial + (b * (WIDTH - 1) + s + WIDTH - 1) * p.d
                   : p.x + b * p.x_batch + s * p.x_token;
  }
  V z(const Conv& p, int64_t c) const {
    V z = load(p.bias, c, p.d - c);
    for (int k = 0; k < WIDTH; ++k)
      z += load(p.weight, k * p.d + c, p.d - c) * load(x[k], c, p.d - c);
    return z;
  }
};

void convolve(const Conv& p, int64_t b, int64_t t) {
  const Window at(p, b, t);
  for (int64_t c = 0; c < p.d; c += LANES) {
    const V z = at.z(p, c);
    store(p.y, (b * p.L + t) * p.d + c, z * sigmoid(z), p.d - c);
  }
}

void convolve_back(const Conv& p, int64_t b, int64_t c) {
  const int64_t width = p.d - c;
  V dz[WIDTH] = {}, dw[WIDTH] = {}, db = {};  // dz[k]: gradient of z_{t+k}
  for (int64_t t = p.L - 1; t > -WIDTH; --t) {
    for (int k = WIDTH - 1; k > 0; --k) dz[k] = dz[k - 1];
    dz[0] = V{};  // before the first token there is only the initial state
    if (t >= 0) {
      const Window at(p, b, t);
      const V z = at.z(p, c), s = sigmoid(z);
      dz[0] = load(p.dy, (b * p.L + t) * p.d + c, width) * s * (1.f + z * (1.f - s));
      db += dz[0];
      for (int k = 0; k < WIDTH; ++k) dw[k] += dz[0] * load(at.x[k], c, width);
    }
    V sum = {};
    for (int k = 0; k < WIDTH; ++k) sum += load(p.weight, (WIDTH - 1 - k) * p.d + c, width) * dz[k];
    if (t >= 0) store(p.dx, (b * p.L + t) * p.d + c, sum, width);
    else store(p.dinitial, (b * (WIDTH - 1) + t + WIDTH - 1) * p.d + c, sum, width);
  }
  for (int k = 0; k < WIDTH; ++k) store(p.dweight, (b * WIDTH + k) * p.d + c, dw[k], width);
  store(p.dbias, b * p.d + c, db, width);
}

// -------------------------------------------------------------------------------------------------
// The operators

// work(i) for every i below count, on torch's threads, but for little work, which is done before
// they are awake.
template <typename Work>
void in_parallel(int64_t count, int64_t floats_each, const Work& work) {
  at::parallel_for(0, count, 200'000 / (floats_each + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i);
  });
}

struct Cpu {  // for operators.h
  static constexpr int parts = 1, channels = INT32_MAX;
  static constexpr bool takes_bf16 = false;

  static void forward(const Scan& p, at::Device) {
    const int64_t blocks = (p.d_inner + LANES - 1) / LANES;
    in_parallel(p.batch * blocks, p.L * LANES * p.N,
                [&](int64_t i) { walk(p, i / blocks, i % blocks * LANES); });
  }
  static void backward(const Scan& p, at::Device) {
    in_parallel(p.batch, p.L * p.d_inner * p.N, [&](int64_t b) {
      std::vector<Token> tape((CHUNK + 1) * p.N);
      // One thread takes all channels of b: dB and dC are sums over them.
      for (int64_t c0 = 0; c0 < p.d_inner; c0 += J * LANES) walk_back(p, b, c0, tape.data());
    });
  }
};

using operators::Arg;
using operators::Four;
using operators::Seven;
using operators::Tensor;
using operators::Three;

struct ConvInputs {  // keep alive what `p` points to
  Tensor x, weight, bias, initial;
  Conv p = {};
  ConvInputs(Arg x_, Arg weight_, Arg bias_, Arg initial_state)
      : x(x_.size(2) == 1 || x_.stride(2) == 1 ? x_ : x_.contiguous()),
        weight(weight_.t().contiguous()),
        bias(bias_.contiguous()),
        initial(initial_state.contiguous()) {
    p.batch = x.size(0), p.L = x.size(1), p.d = x.size(2);
    p.x_batch = x.stride(0), p.x_token = x.stride(1);
    p.x = x.data_ptr<float>();
    p.weight = weight.data_ptr<float>();
    p.bias = bias.data_ptr<float>();
    p.initial = initial.data_ptr<float>();
  }
};

Tensor conv_forward(Arg x, Arg weight, Arg bias, Arg initial_state) {
  at::AutoDispatchBelowADInplaceOrView no_gradients;
  ConvInputs in(x, weight, bias, initial_state);
  Conv& p = in.p;
  const Tensor y = x.new_empty({p.batch, p.L, p.d});
  p.y = y.data_ptr<float>();
  in_parallel(p.batch * p.L, 16 * p.d, [&](int64_t row) { convolve(p, row / p.L, row % p.L); });
  return y;
}

Four conv_backward(Arg dy_, Arg x, Arg weight, Arg bias, Arg initial_state) {
  at::AutoDispatchBelowADInplaceOrView no_gradients;
  ConvInputs in(x, weight, bias, initial_state);
  Conv& p = in.p;
  const Tensor dy = dy_.contiguous(), dx = x.new_empty({p.batch, p.L, p.d});
  const Tensor dweight = x.new_empty({p.batch, WIDTH, p.d}), dbias = x.new_empty({p.batch, p.d});
  const Tensor dinitial = x.new_empty({p.batch, WIDTH - 1, p.d});
  p.dy = dy.data_ptr<float>();
  p.dx = dx.data_ptr<float>();
  p.dweight = dweight.data_ptr<float>();
  p.dbias = dbias.data_ptr<float>();
  p.dinitial = dinitial.data_ptr<float>();
  in_parallel(p.batch, 16 * p.L * p.d, [&](int64_t b) {
    for (int64_t c = 0; c < p.d; c += LANES) convolve_back(p, b, c);
  });
  return {dx, dweight.sum(0).t().contiguous(), dbias.sum(0), dinitial};
}

// -------------------------------------------------------------------------------------------------
// What the results look like, for torch.compile: it calls the operators with tensors that have
// shapes only.

Tensor like(Arg t) { return t.new_empty_symint(t.sym_sizes()); }

Tensor state_like(Arg u, Arg A) {
  return A.new_empty_symint({u.sym_size(0), A.sym_size(1), A.sym_size(0)}).transpose(1, 2);
}

Three scan_forward_like(Arg u, Arg delta, Arg A, Arg B, Arg C, Arg D, Arg initial_state) {
  const auto saved = (u.sym_size(1) - 1) / CHUNK;
  const Tensor starts = A.new_empty_symint({u.sym_size(0), saved, A.sym_size(1), A.sym_size(0)});
  return {like(u), state_like(u, A), starts};
}

Seven scan_backward_like(Arg dy, Arg dfinal, Arg u, Arg delta, Arg A, Arg B, Arg C, Arg D,
                         Arg initial_state, Arg starts) {
  return {like(u), like(delta), like(A), like(B), like(C), like(D), state_like(u, A)};
}

Tensor conv_forward_like(Arg x, Arg weight, Arg bias, Arg initial_state) {
  return like(x);
}

Four conv_backward_like(Arg dy, Arg x, Arg weight, Arg bias, Arg initial_state) {
  return {like(x), like(weight), like(bias), like(initial_state)};
}

}  // namespace

TORCH_LIBRARY(scan_cuda, m) {  // on CUDA: scan_cuda.cpp
  m.def("scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, "
        "Tensor initial_state) -> (Tensor, Tensor, Tensor)");
  m.def("scan_backward(Tensor dy, Tensor dfinal, Tensor u, Tensor delta, Tensor A, Tensor B, "
        "Tensor C, Tensor D, Tensor initial_state, Tensor starts) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("conv_forward(Tensor x, Tensor weight, Tensor bias, Tensor initial_state) -> Tensor");
  m.def("conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor initial_state) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(scan_cuda, CPU, m) {
  m.impl("scan_forward", operators::scan_forward<Cpu>);
  m.impl("scan_backward", operators::scan_backward<Cpu>);
  m.impl("conv_forward", conv_forward);
  m.impl("conv_backward", conv_backward);
}

TORCH_LIBRARY_IMPL(scan_cuda, Meta, m) {
  m.impl("scan_forward", scan_forward_like);
  m.impl("scan_backward", scan_backward_like);
  m.impl("conv_forward", conv_forward_like);
  m.impl("conv_backward", conv_backward_like);
}

// Gradients are __init__.py's concern. Whoever asks the operators themselves for them gets an
// error.
TORCH_LIBRARY_IMPL(scan_cuda, Autograd, m) {
  for (const char* name : {"scan_forward", "scan_backward", "conv_forward", "conv_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}
