// Binds the kernels of scan_kernels.cu to the operators that __init__.py defines: allocates, launches, checks, sums parts.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <tuple>

cudaError_t scan_forward_cuda(cudaStream_t stream, bool bf16, int batch, int L, int d_inner, int N, const void* u,
                              const void* delta, const float* A, const void* B, int64_t B_stride, const void* C,
                              int64_t C_stride, const float* D, const float* initial, void* y, float* final_state,
                              float* starts);
cudaError_t scan_backward_cuda(cudaStream_t stream, bool bf16, int batch, int L, int d_inner, int N, const void* dy,
                               const float* dfinal, const void* u, const void* delta, const float* A, const void* B,
                               int64_t B_stride, const void* C, int64_t C_stride, const float* D, const float* initial,
                               const float* starts, void* du, void* ddelta, float* dA, float* dB, float* dC, float* dD,
                               float* dinitial);

namespace {

using at::Tensor;
using std::optional;

constexpr int64_t CHUNK = 64, CHANNELS = 32;  // scan_kernels.cu's

// (batch, L, d_state) whose tokens lie one stride apart, as slices of wider rows do.
Tensor rows(const Tensor& t) {
  return t.stride(2) == 1 && t.stride(0) == t.size(1) * t.stride(1) ? t : t.contiguous();
}
optional<Tensor> contiguous(const optional<Tensor>& t) { return t ? optional<Tensor>(t->contiguous()) : t; }
const float* pointer(const optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

void check(const Tensor& u, const Tensor& A, int64_t chunk) {
  TORCH_CHECK(chunk == CHUNK && u.size(0) * u.size(1) < INT32_MAX && A.size(1) <= 64 && A.scalar_type() == at::kFloat &&
                  (u.scalar_type() == at::kFloat || u.scalar_type() == at::kBFloat16),
              "scan_cuda: the CUDA kernel takes fp32 or bf16, d_state up to 64, chunks of ", CHUNK);
}

std::tuple<Tensor, Tensor, Tensor> scan_forward(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_,
                                                const Tensor& C_, const optional<Tensor>& D_,
                                                const optional<Tensor>& initial_state, int64_t chunk) {
  check(u_, A_, chunk);
  const c10::cuda::CUDAGuard guard(u_.device());
  const Tensor u = u_.contiguous(), delta = delta_.contiguous(), A = A_.contiguous(), B = rows(B_), C = rows(C_);
  const auto D = contiguous(D_), initial = contiguous(initial_state);
  const int64_t batch = u.size(0), L = u.size(1), d_inner = u.size(2), N = A.size(1);
  Tensor y = at::empty_like(u), final_state = at::empty({batch, d_inner, N}, A.options());
  Tensor starts = at::empty({batch, (L + CHUNK - 1) / CHUNK - 1, N, d_inner}, A.options());
  C10_CUDA_CHECK(scan_forward_cuda(
      c10::cuda::getCurrentCUDAStream(), u.scalar_type() == at::kBFloat16, batch, L, d_inner, N, u.const_data_ptr(),
      delta.const_data_ptr(), A.const_data_ptr<float>(), B.const_data_ptr(), B.stride(1), C.const_data_ptr(), C.stride(1),
      pointer(D), pointer(initial), y.data_ptr(), final_state.data_ptr<float>(), starts.data_ptr<float>()));
  return {y, final_state, starts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const Tensor& dy_, const optional<Tensor>& dfinal_state, const Tensor& u_, const Tensor& delta_, const Tensor& A_,
    const Tensor& B_, const Tensor& C_, const optional<Tensor>& D_, const optional<Tensor>& initial_state,
    const Tensor& starts, int64_t chunk) {
  check(u_, A_, chunk);
  const c10::cuda::CUDAGuard guard(u_.device());
  const Tensor dy = dy_.contiguous(), u = u_.contiguous(), delta = delta_.contiguous(), A = A_.contiguous();
  const Tensor B = rows(B_), C = rows(C_);
  const auto D = contiguous(D_), initial = contiguous(initial_state), dfinal = contiguous(dfinal_state);
  const int64_t batch = u.size(0), L = u.size(1), d_inner = u.size(2), N = A.size(1);
  const int64_t blocks = (d_inner + CHANNELS - 1) / CHANNELS;
  Tensor du = at::empty_like(u), ddelta = at::empty_like(u), dinitial = at::empty({batch, d_inner, N}, A.options());
  Tensor dA = at::empty({batch, N, d_inner}, A.options()), dD = at::empty({batch, d_inner}, A.options());
  Tensor dB = at::empty({blocks, batch, L, N}, A.options()), dC = at::empty_like(dB);
  C10_CUDA_CHECK(scan_backward_cuda(
      c10::cuda::getCurrentCUDAStream(), u.scalar_type() == at::kBFloat16, batch, L, d_inner, N, dy.const_data_ptr(),
      pointer(dfinal), u.const_data_ptr(), delta.const_data_ptr(), A.const_data_ptr<float>(), B.const_data_ptr(),
      B.stride(1), C.const_data_ptr(), C.stride(1), pointer(D), pointer(initial), starts.const_data_ptr<float>(),
      du.data_ptr(), ddelta.data_ptr(), dA.data_ptr<float>(), dB.data_ptr<float>(), dC.data_ptr<float>(),
      dD.data_ptr<float>(), dinitial.data_ptr<float>()));
  const auto type = u.scalar_type();
  return {du, ddelta, dA.sum(0).t().contiguous(), dB.sum(0).to(type), dC.sum(0).to(type), dD.sum(0), dinitial};
}

TORCH_LIBRARY_IMPL(scan_cuda, CUDA, m) {
  m.impl("scan_forward", scan_forward);
  m.impl("scan_backward", scan_backward);
}

}  // namespace
