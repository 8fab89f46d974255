// What the bindings of all devices share: from the arguments of the operators to a Pooling.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "pooling.h"
#include "torch_abi.h"

namespace mmsoftpool {

using Ints = std::vector<int64_t>;

// The axis that varies fastest but i, channels last: C, W, H, (D,) N.
inline int64_t channels_last_axis(int64_t dims, int64_t i) {
  return i == 0 ? 1 : i == dims - 1 ? 0 : dims - i;
}

// Whether the channels vary fastest, (N, H, W, C) or (N, D, H, W, C) without gaps. Axes of size 1
// do not count; a tensor that is contiguous in the usual order as well counts as that.
inline bool is_channels_last(const Tensor& t) {
  const int64_t dims = t.dim();
  if ((dims != 4 && dims != 5) || t.is_contiguous()) {
    return false;
  }
  int64_t expected = 1;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t axis = channels_last_axis(dims, i);
    if (t.size(axis) != 1) {
      if (t.stride(axis) != expected) {
        return false;
      }
      expected *= t.size(axis);
    }
  }
  return true;
}

// Calls run(pointer to the element type) for the dtype of a tensor that PoolArguments has checked.
template <typename Half, typename BFloat16, typename Run>
void with_dtype(const Tensor& t, const Run& run) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return run(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return run(static_cast<double*>(nullptr));
    case ScalarType::Half:
      return run(static_cast<Half*>(nullptr));
    default:
      return run(static_cast<BFloat16*>(nullptr));
  }
}

// The arguments of an operator, checked: its pooling, and its tensors in the layout of that.
// input: (N, C, spatial...). The lists have one entry per spatial axis, padding two: (before,
// after). Users' mistakes are reported in Python; the checks here keep the kernels' memory accesses
// inside the tensors whoever calls.
class PoolArguments {
 public:
  Pooling pooling;

  PoolArguments(
      const Tensor& input, const Ints& kernel_size, const Ints& stride, const Ints& padding,
      const Ints& dilation, bool ceil_mode, double alpha, const std::string& gradient)
      : PoolArguments(input, kernel_size.size(), alpha, gradient) {
    MMSOFTPOOL_CHECK(
        stride.size() == spatial_ && padding.size() == 2 * spatial_ && dilation.size() == spatial_,
        "soft_pool: one stride and dilation and two paddings are needed per kernel size");
    for (size_t i = 0; i < spatial_; ++i) {
      Axis& axis = this->axis(i);
      const int64_t before = padding[2 * i], after = padding[2 * i + 1];
      axis.in = input.size(static_cast<int64_t>(i) + 2);
      axis.kernel_size = kernel_size[i];
      axis.stride = stride[i];
      axis.padding = before;
      axis.dilation = dilation[i];
      // Arguments below 2^31, as torch's own pools have them: no sum or product below overflows.
      const auto is_argument = [](int64_t n) { return n >= 1 && n <= INT32_MAX; };
      MMSOFTPOOL_CHECK(
          axis.in >= 1 && axis.in <= INT64_MAX / 2 && is_argument(axis.kernel_size) &&
              is_argument(axis.stride) && is_argument(axis.dilation) && before >= 0 &&
              before <= axis.kernel_size / 2 && after >= 0 && after <= axis.kernel_size / 2,
          "soft_pool: invalid pooling of axis ", i, " (size ", axis.in, ", kernel_size ",
          axis.kernel_size, ", stride ", axis.stride, ", padding (", before, ", ", after,
          "), dilation ", axis.dilation, ")");
      axis.out = output_size(axis, after, ceil_mode);
      MMSOFTPOOL_CHECK(axis.out >= 1, "soft_pool: axis ", i, " has no output");
      crop_kernel(axis);
    }
    MMSOFTPOOL_CHECK(
        pooling.depth.kernel_size * pooling.height.kernel_size <=
            INT64_MAX / pooling.width.kernel_size,
        "soft_pool: kernel_size has too many taps");
  }

  // Of an adaptive pooling; one output size per spatial axis.
  PoolArguments(
      const Tensor& input, const Ints& output_size, double alpha, const std::string& gradient)
      : PoolArguments(input, output_size.size(), alpha, gradient) {
    for (size_t i = 0; i < spatial_; ++i) {
      const int64_t in = input.size(static_cast<int64_t>(i) + 2), out = output_size[i];
      MMSOFTPOOL_CHECK(
          in >= 1 && out >= 1 && in <= (INT64_MAX - in) / out - 1,
          "adaptive_soft_pool: invalid pooling of axis ", i, " (size ", in, ", output_size ", out,
          ")");
      axis(i) = adaptive_axis(in, out);
    }
  }

  Ints output_sizes() const {
    const int64_t out[] = {pooling.depth.out, pooling.height.out, pooling.width.out};
    Ints sizes{input_.size(0), input_.size(1)};
    sizes.insert(sizes.end(), out + 3 - spatial_, out + 3);
    return sizes;
  }

  // Looked at first: the call of torch takes as long as the pooling of a small map.
  Tensor in_layout(const Tensor& t) const {
    const bool last = pooling.layout == Layout::channels_last;
    return (last ? is_channels_last(t) : t.is_contiguous())
               ? t
               : mmsoftpool::contiguous(t, memory_format());
  }

  Tensor empty(const Ints& sizes) const {
    const int64_t dims = input_.dim();
    Ints strides(sizes);
    int64_t stride = 1;
    for (int64_t i = 0; i < dims; ++i) {
      const bool last = pooling.layout == Layout::channels_last;
      const int64_t axis = last ? channels_last_axis(dims, i) : dims - 1 - i;
      strides[axis] = stride;
      stride *= std::max<int64_t>(sizes[axis], 1);
    }
    return empty_strided(input_, sizes, strides);
  }
  Tensor empty_output() const { return empty(output_sizes()); }
  Tensor empty_input() const { return empty(Ints(input_.sizes().begin(), input_.sizes().end())); }

  void check_grad_output(const Tensor& grad_output) const {
    const Ints sizes = output_sizes();
    MMSOFTPOOL_CHECK(
        grad_output.device() == input_.device(),
        "soft_pool_backward: grad_output must be on the device of input");
    MMSOFTPOOL_CHECK(
        grad_output.scalar_type() == input_.scalar_type(),
        "soft_pool_backward: grad_output must have the dtype of input");
    MMSOFTPOOL_CHECK(
        std::equal(
            sizes.begin(), sizes.end(), grad_output.sizes().begin(), grad_output.sizes().end()),
        "soft_pool_backward: grad_output must have the output's shape");
  }

 private:
  // What all poolings have; the axes are left to the others.
  PoolArguments(const Tensor& input, size_t spatial, double alpha, const std::string& gradient)
      : input_(input), spatial_(spatial) {
    MMSOFTPOOL_CHECK(
        spatial_ >= 1 && spatial_ <= 3 && static_cast<size_t>(input.dim()) == spatial_ + 2,
        "soft_pool: input must be (N, C, spatial...) with 1 to 3 spatial axes, one for each of the "
        "sizes of the pooling, got a ",
        input.dim(), "-dimensional input and ", spatial_, " sizes");
    const ScalarType dtype = input.scalar_type();
    MMSOFTPOOL_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
            dtype == ScalarType::BFloat16,
        "soft_pool: input must be a float16, bfloat16, float32 or float64 tensor");
    MMSOFTPOOL_CHECK(
        std::isfinite(alpha) && alpha >= 0, "soft_pool: alpha must be a finite number >= 0, got ",
        alpha);
    MMSOFTPOOL_CHECK(
        gradient == "exact" || gradient == "paper",
        "soft_pool: gradient must be 'exact' or 'paper', got '", gradient, "'");
    pooling.layout = is_channels_last(input) ? Layout::channels_last : Layout::contiguous;
    pooling.batch = input.size(0);
    pooling.channels = input.size(1);
    pooling.alpha = alpha;
    pooling.gradient = gradient == "exact" ? Gradient::exact : Gradient::paper;
  }

  Axis& axis(size_t i) {
    Axis* const axes[] = {&pooling.depth, &pooling.height, &pooling.width};
    return *axes[3 - spatial_ + i];
  }

  MemoryFormat memory_format() const {
    return pooling.layout == Layout::contiguous ? MemoryFormat::Contiguous
           : spatial_ == 2                      ? MemoryFormat::ChannelsLast
                                                : MemoryFormat::ChannelsLast3d;
  }

  const Tensor& input_;
  size_t spatial_;
};

// The operators of a device from its two functions; the schemas are in mmsoftpool/ops/library.py.
template <
    Tensor (*forward)(const PoolArguments&, const Tensor&),
    Tensor (*backward)(const PoolArguments&, const Tensor& grad_output, const Tensor&)>
struct Operators {
  static Tensor soft_pool(
      const Tensor& input, const Ints& kernel_size, const Ints& stride, const Ints& padding,
      const Ints& dilation, bool ceil_mode, double alpha, const std::string& gradient) {
    return forward(
        {input, kernel_size, stride, padding, dilation, ceil_mode, alpha, gradient}, input);
  }

  static Tensor soft_pool_backward(
      const Tensor& grad_output, const Tensor& input, const Ints& kernel_size, const Ints& stride,
      const Ints& padding, const Ints& dilation, bool ceil_mode, double alpha,
      const std::string& gradient) {
    return backward(
        {input, kernel_size, stride, padding, dilation, ceil_mode, alpha, gradient}, grad_output,
        input);
  }

  static Tensor adaptive_soft_pool(
      const Tensor& input, const Ints& output_size, double alpha, const std::string& gradient) {
    return forward({input, output_size, alpha, gradient}, input);
  }

  static Tensor adaptive_soft_pool_backward(
      const Tensor& grad_output, const Tensor& input, const Ints& output_size, double alpha,
      const std::string& gradient) {
    return backward({input, output_size, alpha, gradient}, grad_output, input);
  }

  template <typename Library>
  static void register_in(Library& library) {
    library.impl("soft_pool", MMSOFTPOOL_KERNEL(&soft_pool));
    library.impl("soft_pool_backward", MMSOFTPOOL_KERNEL(&soft_pool_backward));
    library.impl("adaptive_soft_pool", MMSOFTPOOL_KERNEL(&adaptive_soft_pool));
    library.impl("adaptive_soft_pool_backward", MMSOFTPOOL_KERNEL(&adaptive_soft_pool_backward));
  }
};

}  // namespace mmsoftpool
