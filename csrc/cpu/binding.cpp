// Registers the CPU kernels with PyTorch's dispatcher, through LibTorch's stable ABI: the library
// works with every torch from 2.10 on. The schema, the autograd formulas and the argument checks
// that a user sees are in mmsoftpool/ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <string>
#include <vector>

#include "soft_pool.h"

namespace {

using mmsoftpool::Axis;
using mmsoftpool::Geometry;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// input: (N, C, spatial...); the lists have one entry per spatial axis, padding two: (before,
// after).
Geometry make_geometry(
    const Tensor& input, const Ints& kernel_size, const Ints& stride, const Ints& padding,
    const Ints& dilation, bool ceil_mode) {
  const size_t spatial = kernel_size.size();
  STD_TORCH_CHECK(
      spatial >= 1 && spatial <= 3 && static_cast<size_t>(input.dim()) == spatial + 2 &&
          stride.size() == spatial && padding.size() == 2 * spatial && dilation.size() == spatial,
      "soft_pool: input must be (N, C, spatial...) with one kernel_size, stride and dilation and "
      "two paddings per spatial axis, got a ",
      input.dim(), "-dimensional input and ", spatial, " kernel sizes");
  Geometry g;
  g.planes = input.size(0) * input.size(1);
  Axis* const axes[] = {&g.depth, &g.height, &g.width};
  for (size_t i = 0; i < spatial; ++i) {
    Axis& axis = *axes[3 - spatial + i];
    const int64_t before = padding[2 * i], after = padding[2 * i + 1];
    axis.in = input.size(static_cast<int64_t>(i) + 2);
    axis.kernel = kernel_size[i];
    axis.stride = stride[i];
    axis.pad = before;
    axis.dilation = dilation[i];
    STD_TORCH_CHECK(
        axis.in >= 1 && axis.kernel >= 1 && axis.stride >= 1 && axis.dilation >= 1 && before >= 0 &&
            before <= axis.kernel / 2 && after >= 0 && after <= axis.kernel / 2,
        "soft_pool: invalid pooling of axis ", i, " (size ", axis.in, ", kernel ", axis.kernel,
        ", stride ", axis.stride, ", padding (", before, ", ", after, "), dilation ", axis.dilation,
        ")");
    axis.out = mmsoftpool::output_size(
        axis.in, axis.kernel, axis.stride, before, after, axis.dilation, ceil_mode);
    STD_TORCH_CHECK(axis.out >= 1, "soft_pool: axis ", i, " has no output");
  }
  return g;
}

// About as much work as is worth handing to another thread, counted in taps.
constexpr int64_t taps_per_task = 1 << 15;

int64_t grain(const Geometry& g, int64_t outputs) {
  const int64_t taps = g.depth.kernel * g.height.kernel * g.width.kernel * outputs;
  return std::max<int64_t>(1, taps_per_task / std::max<int64_t>(1, taps));
}

Ints output_sizes(const Tensor& input, const Geometry& g, size_t spatial) {
  const int64_t out[] = {g.depth.out, g.height.out, g.width.out};
  Ints sizes{input.size(0), input.size(1)};
  sizes.insert(sizes.end(), out + 3 - spatial, out + 3);
  return sizes;
}

template <typename T>
void run_forward(const Geometry& g, const Tensor& input, Tensor& output) {
  const T* const in = static_cast<const T*>(input.data_ptr());
  T* const out = static_cast<T*>(output.data_ptr());
  torch::stable::parallel_for(
      0, g.out_rows(), grain(g, g.width.out), [&](int64_t begin, int64_t end) {
        mmsoftpool::cpu::soft_pool_forward(g, in, out, begin, end);
      });
}

Tensor soft_pool(
    const Tensor& input, const Ints& kernel_size, const Ints& stride, const Ints& padding,
    const Ints& dilation, bool ceil_mode, const std::string& /*gradient*/) {
  const Geometry g = make_geometry(input, kernel_size, stride, padding, dilation, ceil_mode);
  const ScalarType dtype = input.scalar_type();
  if (dtype == ScalarType::Half || dtype == ScalarType::BFloat16) {
    const Tensor wide = torch::stable::to(input, ScalarType::Float);
    return torch::stable::to(
        soft_pool(wide, kernel_size, stride, padding, dilation, ceil_mode, {}), dtype);
  }
  const Tensor in = torch::stable::contiguous(input);
  Tensor output = torch::stable::new_empty(in, output_sizes(in, g, kernel_size.size()));
  if (dtype == ScalarType::Float) {
    run_forward<float>(g, in, output);
  } else if (dtype == ScalarType::Double) {
    run_forward<double>(g, in, output);
  } else {
    STD_TORCH_CHECK(false, "soft_pool: input must be a floating point tensor");
  }
  return output;
}

template <typename T>
void run_backward(
    const Geometry& g, mmsoftpool::Gradient gradient, const Tensor& grad_output,
    const Tensor& input, Tensor& grad_input) {
  const T* const grad_out = static_cast<const T*>(grad_output.data_ptr());
  const T* const in = static_cast<const T*>(input.data_ptr());
  T* const grad_in = static_cast<T*>(grad_input.data_ptr());
  torch::stable::parallel_for(
      0, g.planes, grain(g, g.out_plane()), [&](int64_t begin, int64_t end) {
        mmsoftpool::cpu::soft_pool_backward(g, gradient, grad_out, in, grad_in, begin, end);
      });
}

Tensor soft_pool_backward(
    const Tensor& grad_output, const Tensor& input, const Ints& kernel_size, const Ints& stride,
    const Ints& padding, const Ints& dilation, bool ceil_mode, const std::string& gradient) {
  const Geometry g = make_geometry(input, kernel_size, stride, padding, dilation, ceil_mode);
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(
      gradient == "exact" || gradient == "paper",
      "soft_pool: gradient must be 'exact' or 'paper', got '", gradient, "'");
  const Ints expected = output_sizes(input, g, kernel_size.size());
  STD_TORCH_CHECK(
      grad_output.scalar_type() == dtype &&
          std::equal(
              expected.begin(), expected.end(), grad_output.sizes().begin(),
              grad_output.sizes().end()),
      "soft_pool_backward: grad_output does not have the output's shape and dtype");
  if (dtype == ScalarType::Half || dtype == ScalarType::BFloat16) {
    const Tensor wide_grad = torch::stable::to(grad_output, ScalarType::Float);
    const Tensor wide = torch::stable::to(input, ScalarType::Float);
    return torch::stable::to(
        soft_pool_backward(
            wide_grad, wide, kernel_size, stride, padding, dilation, ceil_mode, gradient),
        dtype);
  }
  const auto mode = gradient == "exact" ? mmsoftpool::Gradient::exact : mmsoftpool::Gradient::paper;
  const Tensor grad_out = torch::stable::contiguous(grad_output);
  const Tensor in = torch::stable::contiguous(input);
  Tensor grad_input = torch::stable::new_empty(in, in.sizes());
  if (dtype == ScalarType::Float) {
    run_backward<float>(g, mode, grad_out, in, grad_input);
  } else if (dtype == ScalarType::Double) {
    run_backward<double>(g, mode, grad_out, in, grad_input);
  } else {
    STD_TORCH_CHECK(false, "soft_pool_backward: input must be a floating point tensor");
  }
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmsoftpool, CPU, library) {
  library.impl("soft_pool", TORCH_BOX(&soft_pool));
  library.impl("soft_pool_backward", TORCH_BOX(&soft_pool_backward));
}
