// The operators on a GPU: scan_kernels.cu, bound to torch. A library of its own, so that the CPU
// kernel does not depend on nvcc. The operators are defined in scan_cpu.cpp.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "operators.h"

namespace {

struct Cuda {
  static constexpr int parts = CUDA_PARTS, channels = CUDA_CHANNELS;
  static constexpr bool takes_bf16 = true;

  static void call(int (*kernel)(const Scan&, void*), const Scan& p, at::Device device) {
    const c10::cuda::CUDAGuard guard(device);
    const int error = kernel(p, c10::cuda::getCurrentCUDAStream());
    TORCH_CHECK(error == 0, "scan_cuda: ", cudaGetErrorString(cudaError_t(error)),
                "; remedy: a CUDA toolkit in CUDA_HOME that is no newer than the driver, "
                "or SCAN_CUDA_BUILD=0");
  }
  static void forward(const Scan& p, at::Device device) { call(scan_forward, p, device); }
  static void backward(const Scan& p, at::Device device) { call(scan_backward, p, device); }
};

}  // namespace

TORCH_LIBRARY_IMPL(scan_cuda, CUDA, m) {
  m.impl("scan_forward", operators::scan_forward<Cuda>);
  m.impl("scan_backward", operators::scan_backward<Cuda>);
}
