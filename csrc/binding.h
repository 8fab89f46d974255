// What the bindings of all devices share: from the arguments of the operators to a Geometry.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "geometry.h"
#include "torch_abi.h"

namespace mmsoftpool {

using Ints = std::vector<int64_t>;

// Whether the channels vary fastest, (N, H, W, C) or (N, D, H, W, C) without gaps. Axes of size 1
// do not count; a tensor that is contiguous in the usual order as well counts as that.
inline bool is_channels_last(const Tensor& t) {
  const int64_t dims = t.dim();
  if ((dims != 4 && dims != 5) || t.is_contiguous()) {
    return false;
  }
  int64_t expected = 1;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t axis = i == 0 ? 1 : i == dims - 1 ? 0 : dims - i;  // C, W, H, (D,) N
    if (t.size(axis) != 1) {
      if (t.stride(axis) != expected) {
        return false;
      }
      expected *= t.size(axis);
    }
  }
  return true;
}

// An operator call: its geometry, and its tensors brought into the layout of that.
// input: (N, C, spatial...). The lists have one entry per spatial axis, padding two: (before,
// after). Users' mistakes are reported in Python; the checks here keep the kernels' memory accesses
// inside the tensors whoever calls.
class Call {
 public:
  Geometry geometry;

  Call(
      const Tensor& input, const Ints& kernel_size, const Ints& stride, const Ints& padding,
      const Ints& dilation, bool ceil_mode, double alpha, const std::string& gradient)
      : input_(input), spatial_(kernel_size.size()) {
    MMSOFTPOOL_CHECK(
        spatial_ >= 1 && spatial_ <= 3 && static_cast<size_t>(input.dim()) == spatial_ + 2 &&
            stride.size() == spatial_ && padding.size() == 2 * spatial_ &&
            dilation.size() == spatial_,
        "soft_pool: input must be (N, C, spatial...) with one kernel_size, stride and dilation "
        "and two paddings per spatial axis, got a ",
        input.dim(), "-dimensional input and ", spatial_, " kernel sizes");
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
    Geometry& g = geometry;
    g.alpha = alpha;
    g.gradient = gradient == "exact" ? Gradient::exact : Gradient::paper;
    g.layout = is_channels_last(input) ? Layout::channels_last : Layout::contiguous;
    g.batch = input.size(0);
    g.channels = input.size(1);
    Axis* const axes[] = {&g.depth, &g.height, &g.width};
    for (size_t i = 0; i < spatial_; ++i) {
      Axis& axis = *axes[3 - spatial_ + i];
      const int64_t before = padding[2 * i], after = padding[2 * i + 1];
      axis.in = input.size(static_cast<int64_t>(i) + 2);
      axis.kernel = kernel_size[i];
      axis.stride = stride[i];
      axis.pad = before;
      axis.dilation = dilation[i];
      MMSOFTPOOL_CHECK(
          axis.in >= 1 && axis.kernel >= 1 && axis.stride >= 1 && axis.dilation >= 1 &&
              before >= 0 && before <= axis.kernel / 2 && after >= 0 && after <= axis.kernel / 2,
          "soft_pool: invalid pooling of axis ", i, " (size ", axis.in, ", kernel ", axis.kernel,
          ", stride ", axis.stride, ", padding (", before, ", ", after, "), dilation ",
          axis.dilation, ")");
      axis.out =
          output_size(axis.in, axis.kernel, axis.stride, before, after, axis.dilation, ceil_mode);
      MMSOFTPOOL_CHECK(axis.out >= 1, "soft_pool: axis ", i, " has no output");
    }
  }

  Ints output_sizes() const {
    const int64_t out[] = {geometry.depth.out, geometry.height.out, geometry.width.out};
    Ints sizes{input_.size(0), input_.size(1)};
    sizes.insert(sizes.end(), out + 3 - spatial_, out + 3);
    return sizes;
  }

  Tensor laid_out(const Tensor& t) const { return contiguous(t, memory_format()); }

  Tensor empty(const Ints& sizes) const {
    return mmsoftpool::empty(sizes, input_.scalar_type(), input_.device(), memory_format());
  }
  Tensor empty_output() const { return empty(output_sizes()); }
  Tensor empty_input() const { return empty(Ints(input_.sizes().begin(), input_.sizes().end())); }

  void check_grad_output(const Tensor& grad) const {
    const Ints sizes = output_sizes();
    MMSOFTPOOL_CHECK(
        grad.scalar_type() == input_.scalar_type() && grad.device() == input_.device() &&
            std::equal(sizes.begin(), sizes.end(), grad.sizes().begin(), grad.sizes().end()),
        "soft_pool_backward: grad_output must have the output's shape, dtype and device");
  }

 private:
  MemoryFormat memory_format() const {
    return geometry.layout == Layout::contiguous ? MemoryFormat::Contiguous
           : spatial_ == 2                       ? MemoryFormat::ChannelsLast
                                                 : MemoryFormat::ChannelsLast3d;
  }

  const Tensor& input_;
  size_t spatial_;
};

}  // namespace mmsoftpool
