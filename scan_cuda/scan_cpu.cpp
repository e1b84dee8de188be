// The selective scan on the CPU, forward and backward (the formulas: __init__.py). fp32 inside; bf16 is converted.
//
// The recurrence runs over the tokens one by one, and in vectors over the channels: one vector holds the same state
// index n of LANES neighbouring channels, h[n][channel]. So u, delta and y are read and written as they lie in
// memory, B_t[n] and C_t[n] are one number for all lanes, and y_t = sum over n needs no sum across lanes. A thread
// takes one batch element and J vectors of channels at a time; all their states stay in its L1 cache.
//
// Backward, with g_t = dLoss/dh_t:   g_t = C_t dy_t + a_{t+1} g_{t+1}   where a_t = exp(delta_t A), from the last
// token to the first. It needs a_t and h_t of each token. The forward pass keeps h before every chunk; a chunk's a
// and h are recomputed into a buffer that fits the L2 cache, so that each exponential is taken once per pass.
// Sums over channels (dB, dC) and over the batch (dA, dD) are written as parts and added in a fixed order: the
// same input gives the same gradients, bit by bit, with any number of threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using std::optional;

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
// Vector types of gcc and clang: arithmetic works element by element. They may lie anywhere in a float array.
typedef float V __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int I __attribute__((vector_size(LANES * 4)));

constexpr int J = 2, W = J * LANES;  // a thread works on J vectors, W channels, at a time
constexpr int MAX_STATE = 64;
constexpr float LOG2E = 1.44269504f;  // exp(x) = 2^(x log2 e); A is multiplied by it once

inline V& vec(float* p) { return *reinterpret_cast<V*>(p); }
inline const V& vec(const float* p) { return *reinterpret_cast<const V*>(p); }

// The first `count` floats (all, if there are LANES or more); zeros are read for the rest, nothing is written.
inline V load_some(const float* from, int count) {
  if (count >= LANES) return vec(from);
  V v = {};
  if (count > 0) std::memcpy(&v, from, count * 4);
  return v;
}
inline void store_some(float* to, V v, int count) {
  if (count >= LANES) vec(to) = v;
  else if (count > 0) std::memcpy(to, &v, count * 4);
}

// 2^x to 1.7e-7 relative: 2^round(x) put together in the exponent bits, times a polynomial (minimax, p(0) = 1) for the
// rest in [-1/2, 1/2]. Below 2^-126.5 the result is 0, above 2^127.5 infinity.
inline V exp2(V x) {
  const V shifted = x + 12582912.f;  // 1.5 * 2^23: there the spacing of floats is 1, the last bits are round(x)
  const V f = x - (shifted - 12582912.f);
  I k;
  std::memcpy(&k, &shifted, sizeof k);
  k -= 0x4B400000 - 127;  // the bits of 1.5 * 2^23; 127: the bias of the exponent
  k = k < 0 ? I{} : k;
  k = k > 255 ? I{} + 255 : k;
  k <<= 23;
  V scale;
  std::memcpy(&scale, &k, sizeof k);
  V p = f * 1.32647272e-3f + 9.67151269e-3f;
  p = p * f + 5.55073374e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  return (p * f + 1.f) * scale;
}

// The one shuffle: exchange the lanes of x and y that are S apart. For S = 1 and four lanes
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
using Lanes = std::make_integer_sequence<int, LANES>;

template <int S = 1>
inline void transpose(V* v) {  // LANES vectors: each bit of the row number changes places with that of the lane
  if constexpr (S < LANES) {
    for (int i = 0; i < LANES; ++i)
      if (!(i & S)) exchange<S>(v[i], v[i + S], Lanes());
    transpose<2 * S>(v);
  }
}

template <int S = 1>
inline V sums(V* v) {  // lane i of the result is the sum of the lanes of v[i]: the same, adding as it goes
  if constexpr (S == LANES) return v[0];
  else {
    for (int i = 0; i < LANES / S; i += 2) {
      exchange<S>(v[i], v[i + 1], Lanes());
      v[i / 2] = v[i] + v[i + 1];
    }
    return sums<2 * S>(v);
  }
}

inline void store_sums(float* to, V* v, int N) {  // to[n] = sum of the lanes of v[n]
  for (int n = 0; n < N; n += LANES) store_some(to + n, sums(v + n), N - n);
}

// A (batch, L, *) tensor as fp32 rows; slices of wider rows (B and C are) are read where they lie.
struct Rows {
  Tensor tensor;
  const float* data;
  int64_t stride;
  explicit Rows(const Tensor& t) : tensor(t.scalar_type() == at::kFloat ? t : t.to(at::kFloat)) {
    if (tensor.stride(2) != 1 || tensor.stride(0) != tensor.size(1) * tensor.stride(1)) tensor = tensor.contiguous();
    data = tensor.const_data_ptr<float>();
    stride = tensor.stride(1);
  }
  const float* operator[](int64_t row) const { return data + row * stride; }
};

// What one call works on. State-shaped tensors are kept as (.., d_state, d_inner) here.
struct Problem {
  int64_t batch, L, d_inner, N, chunk, chunks;
  Rows u, delta, B, C;
  Tensor A_tensor, D_tensor;
  const float *A, *D;
  Problem(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
          const optional<Tensor>& D, int64_t chunk)
      : batch(u.size(0)), L(u.size(1)), d_inner(u.size(2)), N(A.size(1)), chunk(chunk), chunks((L + chunk - 1) / chunk),
        u(u), delta(delta), B(B), C(C), A_tensor((A.t() * LOG2E).contiguous()),
        D_tensor(D ? D->contiguous() : at::zeros({d_inner}, A.options())),
        A(A_tensor.const_data_ptr<float>()), D(D_tensor.const_data_ptr<float>()) {
    TORCH_CHECK(N <= MAX_STATE && A.scalar_type() == at::kFloat, "scan_cuda: A must be fp32 with d_state up to 64");
  }
  int64_t start(int64_t b, int64_t k, int64_t n) const { return ((b * (chunks - 1) + k - 1) * N + n) * d_inner; }
};

// The W channels from c0 on that a thread works on; zeros where they reach past d_inner.
struct Block {
  int width;
  void load(V (&to)[J], const float* from) const {
    for (int j = 0; j < J; ++j) to[j] = load_some(from + j * LANES, width - j * LANES);
  }
  void store(float* to, const V (&from)[J]) const {
    for (int j = 0; j < J; ++j) store_some(to + j * LANES, from[j], width - j * LANES);
  }
  void load(float (&to)[W], const float* from) const {
    for (int j = 0; j < J; ++j) vec(to + j * LANES) = load_some(from + j * LANES, width - j * LANES);
  }
  void store(float* to, const float (&from)[W]) const {
    for (int j = 0; j < J; ++j) store_some(to + j * LANES, vec(from + j * LANES), width - j * LANES);
  }
  // A state, (channels, N) in memory, is turned into h (N, W), and back.
  void load_state(float (*h)[W], const float* from, int N) const {
    for (int n = 0; n < N; n += LANES)
      for (int c = 0; c < W; c += LANES) {
        V v[LANES] = {};
        if (from)
          for (int i = 0; i < std::min(LANES, width - c); ++i) v[i] = load_some(from + (c + i) * N + n, N - n);
        transpose(v);
        for (int i = 0; i < std::min(LANES, N - n); ++i) vec(h[n + i] + c) = v[i];
      }
  }
  void store_state(float* to, const float (*h)[W], int N) const {
    for (int n = 0; n < N; n += LANES)
      for (int c = 0; c < width; c += LANES) {
        V v[LANES] = {};
        for (int i = 0; i < std::min(LANES, N - n); ++i) v[i] = vec(h[n + i] + c);
        transpose(v);
        for (int i = 0; i < std::min(LANES, width - c); ++i) store_some(to + (c + i) * N + n, v[i], N - n);
      }
  }
};

void forward_block(const Problem& p, int64_t b, int64_t c0, const float* initial, float* y, float* final_state,
                   float* starts) {
  const Block block{int(std::min<int64_t>(W, p.d_inner - c0))};
  const int N = p.N;
  alignas(64) float A[MAX_STATE][W], h[MAX_STATE][W];
  for (int n = 0; n < N; ++n) block.load(A[n], p.A + n * p.d_inner + c0);
  V D[J];
  block.load(D, p.D + c0);
  const int64_t state = (b * p.d_inner + c0) * N;
  block.load_state(h, initial ? initial + state : nullptr, N);
  for (int64_t t = 0; t < p.L; ++t) {
    if (t && t % p.chunk == 0)
      for (int n = 0; n < N; ++n) block.store(starts + p.start(b, t / p.chunk, n) + c0, h[n]);
    const int64_t row = b * p.L + t;
    V u[J], d[J], du[J], out[J];
    block.load(u, p.u[row] + c0);
    block.load(d, p.delta[row] + c0);
    for (int j = 0; j < J; ++j) du[j] = d[j] * u[j], out[j] = D[j] * u[j];
    const float *B = p.B[row], *C = p.C[row];
    for (int n = 0; n < N; ++n) {
      const float Bn = B[n], Cn = C[n];
      for (int j = 0; j < J; ++j) {
        V& state = vec(h[n] + j * LANES);
        state = exp2(d[j] * vec(A[n] + j * LANES)) * state + du[j] * Bn;
        out[j] += state * Cn;
      }
    }
    block.store(y + row * p.d_inner + c0, out);
  }
  block.store_state(final_state + state, h, N);
}

struct Gradients {  // parts: dB, dC (blocks, batch, L, d_state), dA (batch, d_state, d_inner), dD (batch, d_inner)
  float *u, *delta, *A, *B, *C, *D, *initial;
};

void backward_block(const Problem& p, int64_t b, int64_t c0, const Rows& dy_rows, const float* dfinal,
                    const float* initial, const float* starts, const Gradients& to, std::vector<float>& scratch) {
  const Block block{int(std::min<int64_t>(W, p.d_inner - c0))};
  const int N = p.N;
  alignas(64) float A[MAX_STATE][W], dA[MAX_STATE][W], g[MAX_STATE][W];  // g: a_{t+1} g_{t+1}, from the token behind
  for (int n = 0; n < N; ++n) block.load(A[n], p.A + n * p.d_inner + c0);
  std::memset(dA, 0, sizeof(dA[0]) * N);
  V D[J], dD[J] = {};
  V sum_B[MAX_STATE] = {}, sum_C[MAX_STATE] = {};
  block.load(D, p.D + c0);
  const int64_t state = (b * p.d_inner + c0) * N;
  block.load_state(g, dfinal ? dfinal + state : nullptr, N);

  scratch.resize((2 * p.chunk + 1) * N * W + LANES);
  float* aligned = scratch.data() + (-reinterpret_cast<intptr_t>(scratch.data()) / 4 & (LANES - 1));
  auto h = reinterpret_cast<float(*)[W]>(aligned);  // h[t N + n]: before token t of the chunk
  auto a = h + (p.chunk + 1) * N;
  const int64_t part = (c0 / W * p.batch + b) * p.L;
  for (int64_t k = p.chunks - 1; k >= 0; --k) {
    const int64_t first = k * p.chunk, T = std::min(p.chunk, p.L - first);
    if (k) for (int n = 0; n < N; ++n) block.load(h[n], starts + p.start(b, k, n) + c0);
    else block.load_state(h, initial ? initial + state : nullptr, N);
    for (int64_t t = 0; t < T; ++t) {
      const int64_t row = b * p.L + first + t;
      V u[J], d[J];
      block.load(u, p.u[row] + c0);
      block.load(d, p.delta[row] + c0);
      for (int j = 0; j < J; ++j) u[j] *= d[j];
      const float* B = p.B[row];
      for (int n = 0; n < N; ++n)
        for (int j = 0; j < J; ++j) {
          const V decay = exp2(d[j] * vec(A[n] + j * LANES));
          vec(a[t * N + n] + j * LANES) = decay;
          vec(h[(t + 1) * N + n] + j * LANES) = decay * vec(h[t * N + n] + j * LANES) + u[j] * B[n];
        }
    }
    for (int64_t t = T - 1; t >= 0; --t) {
      const int64_t row = b * p.L + first + t;
      V u[J], d[J], du[J], dy[J], gB[J] = {}, gA[J] = {};  // gradients of delta u, and of delta through delta A
      block.load(u, p.u[row] + c0);
      block.load(d, p.delta[row] + c0);
      block.load(dy, dy_rows[row] + c0);
      for (int j = 0; j < J; ++j) du[j] = d[j] * u[j], dD[j] += dy[j] * u[j];
      const float *B = p.B[row], *C = p.C[row];
      for (int n = 0; n < N; ++n) {
        const float Bn = B[n], Cn = C[n];
        V now_B = {}, now_C = {};
        for (int j = 0; j < J; ++j) {
          const int i = j * LANES;
          const V now = vec(g[n] + i) + dy[j] * Cn;      // g_t
          const V before = now * vec(a[t * N + n] + i);  // a_t g_t
          vec(g[n] + i) = before;
          const V decay = before * vec(h[t * N + n] + i);  // gradient of delta_t A
          now_B += now * du[j];
          now_C += dy[j] * vec(h[(t + 1) * N + n] + i);
          gB[j] += now * Bn;
          gA[j] += decay * vec(A[n] + i);
          vec(dA[n] + i) += decay * d[j];
        }
        sum_B[n] = now_B;
        sum_C[n] = now_C;
      }
      store_sums(to.B + (part + first + t) * N, sum_B, N);
      store_sums(to.C + (part + first + t) * N, sum_C, N);
      for (int j = 0; j < J; ++j) {
        d[j] = gB[j] * d[j] + D[j] * dy[j];
        u[j] = gB[j] * u[j] + gA[j] * (1 / LOG2E);
      }
      block.store(to.u + row * p.d_inner + c0, d);
      block.store(to.delta + row * p.d_inner + c0, u);
    }
  }
  for (int n = 0; n < N; ++n) block.store(to.A + (b * N + n) * p.d_inner + c0, dA[n]);
  block.store(to.D + b * p.d_inner + c0, dD);
  block.store_state(to.initial + state, g, N);
}

int threads(int64_t work) { return work < 200'000 ? 1 : at::get_num_threads(); }  // less is done before they are awake

const float* pointer(const optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }
optional<Tensor> contiguous(const optional<Tensor>& t) { return t ? optional<Tensor>(t->contiguous()) : t; }

std::tuple<Tensor, Tensor, Tensor> scan_forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                                const Tensor& C, const optional<Tensor>& D,
                                                const optional<Tensor>& initial_state, int64_t chunk) {
  const Problem p(u, delta, A, B, C, D, chunk);
  const auto initial = contiguous(initial_state);
  Tensor y = at::empty({p.batch, p.L, p.d_inner}, A.options());
  Tensor final_state = at::empty({p.batch, p.d_inner, p.N}, A.options());
  Tensor starts = at::empty({p.batch, p.chunks - 1, p.N, p.d_inner}, A.options());
  const float* from = pointer(initial);
  float *to_y = y.data_ptr<float>(), *to_final = final_state.data_ptr<float>(), *to_starts = starts.data_ptr<float>();
  const int64_t blocks = (p.d_inner + W - 1) / W;
#pragma omp parallel for num_threads(threads(p.batch * p.L * p.d_inner * p.N)) schedule(static)
  for (int64_t item = 0; item < p.batch * blocks; ++item)
    forward_block(p, item / blocks, item % blocks * W, from, to_y, to_final, to_starts);
  return {y.to(u.scalar_type()), final_state, starts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const Tensor& dy, const optional<Tensor>& dfinal_state, const Tensor& u, const Tensor& delta, const Tensor& A,
    const Tensor& B, const Tensor& C, const optional<Tensor>& D, const optional<Tensor>& initial_state,
    const Tensor& starts, int64_t chunk) {
  const Problem p(u, delta, A, B, C, D, chunk);
  const Rows dy_rows(dy);
  const auto initial = contiguous(initial_state), dfinal = contiguous(dfinal_state);
  const int64_t blocks = (p.d_inner + W - 1) / W;
  const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, A.options()); };
  Tensor du = empty({p.batch, p.L, p.d_inner}), ddelta = empty({p.batch, p.L, p.d_inner});
  Tensor dB = empty({blocks, p.batch, p.L, p.N}), dC = empty({blocks, p.batch, p.L, p.N});
  Tensor dA = empty({p.batch, p.N, p.d_inner}), dD = empty({p.batch, p.d_inner});
  Tensor dinitial = empty({p.batch, p.d_inner, p.N});
  const Gradients to{du.data_ptr<float>(), ddelta.data_ptr<float>(), dA.data_ptr<float>(), dB.data_ptr<float>(),
                     dC.data_ptr<float>(), dD.data_ptr<float>(), dinitial.data_ptr<float>()};
  const float *from = pointer(initial), *from_final = pointer(dfinal), *from_starts = starts.const_data_ptr<float>();
#pragma omp parallel num_threads(threads(p.batch * p.L * p.d_inner * p.N))
  {
    std::vector<float> scratch;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < p.batch * blocks; ++item)
      backward_block(p, item / blocks, item % blocks * W, dy_rows, from_final, from, from_starts, to, scratch);
  }
  const auto type = u.scalar_type();
  return {du.to(type), ddelta.to(type), dA.sum(0).t().contiguous(), dB.sum(0).to(type), dC.sum(0).to(type), dD.sum(0),
          dinitial};
}

// ---------------------------------------------------------------------------------------------
// The convolution before the scan: y_t = silu(z_t), z_t = bias + sum over k of weight_k x_{t-K+1+k}, per channel.

constexpr int K = 4;

struct Convolution {
  int64_t batch, L, d;
  Rows x;
  Tensor weight_tensor, bias_tensor, initial_tensor;
  const float *weight, *bias, *initial;
  Convolution(const Tensor& x, const Tensor& w, const Tensor& bias, const optional<Tensor>& initial_state)
      : batch(x.size(0)), L(x.size(1)), d(x.size(2)), x(x), weight_tensor(w.t().contiguous()),
        bias_tensor(bias.contiguous()),
        initial_tensor(initial_state ? initial_state->to(at::kFloat).contiguous() : at::zeros({batch, K - 1, d}, w.options())),
        weight(weight_tensor.const_data_ptr<float>()), bias(bias_tensor.const_data_ptr<float>()),
        initial(initial_tensor.const_data_ptr<float>()) {
    TORCH_CHECK(w.size(1) == K && w.scalar_type() == at::kFloat, "scan_cuda: weight must be fp32, (d, ", K, ")");
  }
  const float* row(int64_t b, int64_t t) const { return t < 0 ? initial + (b * (K - 1) + t + K - 1) * d : x[b * L + t]; }
};

inline V sigmoid(V z) { return 1.f / (1.f + exp2(z * -LOG2E)); }

// Forward (y) and backward (dy to dx, and the parts dweight (batch, K, d), dbias (batch, d), dinitial) of LANES channels.
// The last K inputs and, from the last token to the first, the next K gradients of z stay in registers.
void convolve_block(const Convolution& p, int64_t b, int64_t c0, float* y) {
  const int width = std::min<int64_t>(LANES, p.d - c0);
  const V bias = load_some(p.bias + c0, width);
  V w[K], x[K];
  for (int k = 0; k < K; ++k) w[k] = load_some(p.weight + k * p.d + c0, width);
  for (int k = 1; k < K; ++k) x[k] = load_some(p.row(b, k - K) + c0, width);
  for (int64_t t = 0; t < p.L; ++t) {
    for (int k = 1; k < K; ++k) x[k - 1] = x[k];
    x[K - 1] = load_some(p.row(b, t) + c0, width);
    V z = bias;
    for (int k = 0; k < K; ++k) z += w[k] * x[k];
    store_some(y + (b * p.L + t) * p.d + c0, z * sigmoid(z), width);
  }
}

void convolve_backward_block(const Convolution& p, int64_t b, int64_t c0, const Rows& dy, float* dx, float* dweight,
                             float* dbias, float* dinitial) {
  const int width = std::min<int64_t>(LANES, p.d - c0);
  const V bias = load_some(p.bias + c0, width);
  V w[K], x[K] = {}, dz[K] = {}, dw[K] = {}, db = {};  // x[k]: input t - K + 1 + k; dz[k]: gradient of z_{t+k}
  for (int k = 0; k < K; ++k) w[k] = load_some(p.weight + k * p.d + c0, width);
  for (int k = 0; k < K - 1; ++k) x[k] = load_some(p.row(b, p.L - K + 1 + k) + c0, width);
  for (int64_t t = p.L - 1; t > -K; --t) {
    for (int k = K - 1; k > 0; --k) dz[k] = dz[k - 1], x[k] = x[k - 1];
    dz[0] = V{};  // before the first token there is only the initial state
    if (t >= 0) {
      x[0] = load_some(p.row(b, t - K + 1) + c0, width);
      V z = bias;
      for (int k = 0; k < K; ++k) z += w[k] * x[k];
      const V s = sigmoid(z);
      dz[0] = load_some(dy[b * p.L + t] + c0, width) * s * (1.f + z * (1.f - s));
      db += dz[0];
      for (int k = 0; k < K; ++k) dw[k] += dz[0] * x[k];
    }
    V out = {};
    for (int k = 0; k < K; ++k) out += w[K - 1 - k] * dz[k];
    store_some((t < 0 ? dinitial + (b * (K - 1) + t + K - 1) * p.d : dx + (b * p.L + t) * p.d) + c0, out, width);
  }
  for (int k = 0; k < K; ++k) store_some(dweight + (b * K + k) * p.d + c0, dw[k], width);
  store_some(dbias + b * p.d + c0, db, width);
}

Tensor conv_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const optional<Tensor>& initial_state) {
  const Convolution p(x, weight, bias, initial_state);
  Tensor y = at::empty({p.batch, p.L, p.d}, weight.options());
  float* to = y.data_ptr<float>();
  const int64_t blocks = (p.d + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads(p.batch * p.L * p.d)) schedule(static)
  for (int64_t item = 0; item < p.batch * blocks; ++item) convolve_block(p, item / blocks, item % blocks * LANES, to);
  return y.to(x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                         const Tensor& bias, const optional<Tensor>& initial_state) {
  const Convolution p(x, weight, bias, initial_state);
  const Rows dy_rows(dy);
  const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, weight.options()); };
  Tensor dx = empty({p.batch, p.L, p.d}), dweight = empty({p.batch, K, p.d}), dbias = empty({p.batch, p.d});
  Tensor dinitial = empty({p.batch, K - 1, p.d});
  float *to_x = dx.data_ptr<float>(), *to_weight = dweight.data_ptr<float>(), *to_bias = dbias.data_ptr<float>(),
        *to_initial = dinitial.data_ptr<float>();
  const int64_t blocks = (p.d + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads(p.batch * p.L * p.d)) schedule(static)
  for (int64_t item = 0; item < p.batch * blocks; ++item)
    convolve_backward_block(p, item / blocks, item % blocks * LANES, dy_rows, to_x, to_weight, to_bias, to_initial);
  const auto type = x.scalar_type();
  return {dx.to(type), dweight.sum(0).t().contiguous(), dbias.sum(0), dinitial.to(type)};
}

// For bench.py, which wants to know how fast exponentials can be: x = 2^x, many times over, on one thread.
Tensor exponentials(const Tensor& x, int64_t times) {
  Tensor y = x.clone();
  float* p = y.data_ptr<float>();
  for (int64_t k = 0; k < times; ++k)
    for (int64_t i = 0; i + LANES <= y.numel(); i += LANES) vec(p + i) = exp2(vec(p + i));
  return y;
}

TORCH_LIBRARY_FRAGMENT(scan_cuda, m) { m.def("exponentials(Tensor x, int times) -> Tensor"); }

TORCH_LIBRARY_IMPL(scan_cuda, CPU, m) {
  m.impl("scan_forward", scan_forward);
  m.impl("scan_backward", scan_backward);
  m.impl("conv_forward", conv_forward);
  m.impl("conv_backward", conv_backward);
  m.impl("exponentials", exponentials);
}

}  // namespace
