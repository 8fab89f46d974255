// How the tests pass a pooling to C++.
#pragma once

#include "../../csrc/pooling.h"

// shape: layout (1 for channels last), batch, channels, and in, out, kernel_size, stride, padding,
// dilation of depth, height and width; kernel_size 0 for an adaptive axis.
inline mmsoftpool::Pooling make_pooling(const int64_t* shape, double alpha, int exact) {
  using namespace mmsoftpool;
  Pooling pooling;
  pooling.layout = shape[0] ? Layout::channels_last : Layout::contiguous;
  pooling.batch = shape[1];
  pooling.channels = shape[2];
  Axis* const axes[] = {&pooling.depth, &pooling.height, &pooling.width};
  for (int i = 0; i < 3; ++i) {
    const int64_t* const a = shape + 3 + 6 * i;
    *axes[i] = a[2] > 0 ? Axis{a[0], a[1], a[2], a[3], a[4], a[5]} : adaptive_axis(a[0], a[1]);
  }
  pooling.alpha = alpha;
  pooling.gradient = exact ? Gradient::exact : Gradient::paper;
  return pooling;
}
