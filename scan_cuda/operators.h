// The operators that torch sees: they allocate the results and call a kernel. For scan_cpu.cpp and
// scan_cuda.cpp, which say what `Kernel` is: its functions, and what they want.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "scan.h"

namespace operators {

using at::Tensor;
using Arg = const at::Tensor&;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// (batch, d_inner, d_state) as kernels have it, (batch, d_state, d_inner); their own states are not
// copied.
inline Tensor turn(Arg state) { return state.transpose(1, 2).contiguous(); }

struct Inputs {  // of a kernel, laid out as scan.h says. They keep alive what `p` points to.
  Tensor u, delta, A, B, C, D, initial;
  Scan p = {};
};

// contiguous() may return a tensor whose dimensions of size 1 have odd strides. Nothing here reads
// strides.
template <typename Kernel>
Tensor values(Arg t) {
  return t.to(Kernel::takes_bf16 ? t.scalar_type() : at::kFloat).contiguous();
}

template <typename Kernel>
Inputs inputs_of(Arg u, Arg delta, Arg A, Arg B, Arg C, Arg D, Arg initial_state) {
  Inputs in{values<Kernel>(u), values<Kernel>(delta), A.t().contiguous(), values<Kernel>(B),
            values<Kernel>(C), D.contiguous(),        turn(initial_state)};
  Scan& p = in.p;
  p.batch = u.size(0), p.L = u.size(1), p.d_inner = u.size(2), p.N = A.size(1);
  TORCH_CHECK_VALUE(p.L >= 1 && p.N >= 1 && p.N <= MAX_STATE,
                    "selective_scan: L must be at least 1, d_state from 1 to ", MAX_STATE,
                    ", not ", p.L, " and ", p.N);
  p.bf16 = in.u.scalar_type() == at::kBFloat16;
  p.u = in.u.data_ptr();
  p.delta = in.delta.data_ptr();
  p.B = in.B.data_ptr();
  p.C = in.C.data_ptr();
  p.A = in.A.data_ptr<float>();
  p.D = in.D.data_ptr<float>();
  p.initial = in.initial.data_ptr<float>();
  return in;
}

// u (batch, L, d_inner) ... -> y, final_state (batch, d_inner, d_state), starts (batch, chunks - 1,
// d_state, d_inner), the states before chunks 1, 2, ...: for the backward pass
template <typename Kernel>
Three scan_forward(Arg u, Arg delta, Arg A, Arg B, Arg C, Arg D, Arg initial_state) {
  at::AutoDispatchBelowADInplaceOrView no_gradients;
  Inputs in = inputs_of<Kernel>(u, delta, A, B, C, D, initial_state);
  Scan& p = in.p;
  const Tensor y = in.u.new_empty({p.batch, p.L, p.d_inner});
  const Tensor final_state = A.new_empty({p.batch, p.N, p.d_inner});
  const Tensor starts = A.new_empty({p.batch, (p.L - 1) / CHUNK, p.N, p.d_inner});
  p.y = y.data_ptr();
  p.final_state = final_state.data_ptr<float>();
  p.starts = starts.data_ptr<float>();
  if (u.numel()) Kernel::forward(p, u.device());
  return {y.to(u.scalar_type()), final_state.transpose(1, 2), starts};
}

// Gradients of the seven inputs, from those of y and final_state.
template <typename Kernel>
Seven scan_backward(Arg dy, Arg dfinal, Arg u, Arg delta, Arg A, Arg B, Arg C, Arg D,
                    Arg initial_state, Arg starts) {
  at::AutoDispatchBelowADInplaceOrView no_gradients;
  Inputs in = inputs_of<Kernel>(u, delta, A, B, C, D, initial_state);
  Scan& p = in.p;
  const Tensor dy_values = values<Kernel>(dy), dfinal_turned = turn(dfinal);
  const int64_t blocks = (p.d_inner + Kernel::channels - 1) / Kernel::channels;
  const Tensor du = in.u.new_empty({p.batch, p.L, p.d_inner});
  const Tensor ddelta = in.u.new_empty({p.batch, p.L, p.d_inner});
  const Tensor dA = A.new_zeros({p.batch, Kernel::parts, p.N, p.d_inner});
  const Tensor dD = A.new_zeros({p.batch, Kernel::parts, p.d_inner});
  const Tensor dB = A.new_zeros({blocks, p.batch, p.L, p.N});
  const Tensor dC = A.new_zeros({blocks, p.batch, p.L, p.N});
  const Tensor dinitial = A.new_empty({p.batch, p.N, p.d_inner});
  p.starts = starts.data_ptr<float>();
  p.dy = dy_values.data_ptr();
  p.dfinal = dfinal_turned.data_ptr<float>();
  p.du = du.data_ptr();
  p.ddelta = ddelta.data_ptr();
  p.dA = dA.data_ptr<float>();
  p.dB = dB.data_ptr<float>();
  p.dC = dC.data_ptr<float>();
  p.dD = dD.data_ptr<float>();
  p.dinitial = dinitial.data_ptr<float>();
  if (u.numel()) Kernel::backward(p, u.device());
  const auto type = u.scalar_type();
  return {du.to(type),
          ddelta.to(type),
          dA.sum(at::IntArrayRef{0, 1}).t().contiguous(),
          dB.sum(0).to(type),
          dC.sum(0).to(type),
          dD.sum(at::IntArrayRef{0, 1}),
          dinitial.transpose(1, 2)};
}

}  // namespace operators
