// Depthwise convolution. Bound by memory: every pixel is written once, all channels of it in a row.

#include "common.h"

namespace {

// to[c] = sum over i < n of from[i][c] * kernel[i][c].
void SumOfProducts(int n, const float* const* from, const float* const* kernel, int channels, float* to) {
  int c = 0;
  for (; c + 16 <= channels; c += 16) {
    Vec16 sum = {};
    for (int i = 0; i < n; i++) sum += Load<Vec16>(from[i] + c) * Load<Vec16>(kernel[i] + c);
    Store(to + c, sum);
  }
  for (; c < channels; c++) {
    to[c] = 0;
    for (int i = 0; i < n; i++) to[c] += from[i][c] * kernel[i][c];
  }
}

// With `spread` the gradient with respect to the input: `x` is then the output's gradient, `y` the input's.
ffi::Error Depthwise(ffi::ThreadPool pool, int64_t stride, bool spread, Array x, Array kernel, Result y) {
  auto in = x.dimensions(), out = y->dimensions();
  int batch = in[0], channels = in[3], size = kernel.dimensions()[0], pad = size / 2;
  int height = in[1], width = in[2], out_height = out[1], out_width = out[2];
  const float *from = x.typed_data(), *weights = kernel.typed_data();
  float* to = y->typed_data();
  // The coordinate that tap i of output `o` reads; negative where there is none.
  auto source = [=](int o, int i, int n) {
    int at = spread ? o + pad - i : o * (int)stride + i - pad;
    if (spread) at = at < 0 || at % stride ? -1 : at / (int)stride;
    return at < n ? at : -1;
  };
  ParallelFor(pool, batch, [=](int b) {
    std::vector<const float*> seen(size * size), taps(size * size);
    const float* image = from + (size_t)b * height * width * channels;
    float* pixel = to + (size_t)b * out_height * out_width * channels;
    for (int oy = 0; oy < out_height; oy++)
      for (int ox = 0; ox < out_width; ox++, pixel += channels) {
        int n = 0;
        for (int i = 0; i < size; i++)
          for (int j = 0; j < size; j++) {
            int iy = source(oy, i, height), ix = source(ox, j, width);
            if (iy < 0 || ix < 0) continue;
            seen[n] = image + ((size_t)iy * width + ix) * channels;
            taps[n++] = weights + (size_t)(i * size + j) * channels;
          }
        SumOfProducts(n, seen.data(), taps.data(), channels, pixel);
      }
  });
  return ffi::Error::Success();
}

ffi::Error DepthwiseKernelGradient(ffi::ThreadPool pool, int64_t stride, Array x, Array g, Result gradient) {
  auto in = x.dimensions(), out = g.dimensions();
  int batch = in[0], height = in[1], width = in[2], channels = in[3], out_height = out[1], out_width = out[2];
  int size = gradient->dimensions()[0], pad = size / 2;
  const float *images = x.typed_data(), *gs = g.typed_data();
  SumOfGroups(pool, (size_t)size * size * channels, gradient->typed_data(), [=](int group, float* sums) {
    for (int b = group; b < batch; b += kGroups)
      for (int oy = 0; oy < out_height; oy++) {
        const float* from = gs + ((size_t)b * out_height + oy) * out_width * channels;
        for (int i = 0; i < size; i++) {
          int iy = oy * stride + i - pad;
          if (iy < 0 || iy >= height) continue;
          const float* row = images + ((size_t)b * height + iy) * width * channels;
          for (int j = 0; j < size; j++) {
            if (width - 1 + pad - j < 0) continue;
            float* to = sums + (size_t)(i * size + j) * channels;
            int first = std::max(0, (pad - j + (int)stride - 1) / (int)stride);
            int last = std::min(out_width - 1, (width - 1 + pad - j) / (int)stride);
            auto add = [&]<class V>(int c) {
              V sum = Load<V>(to + c);
              for (int ox = first; ox <= last; ox++) {
                const float* seen = row + (size_t)(ox * stride + j - pad) * channels;
                sum += Load<V>(seen + c) * Load<V>(from + (size_t)ox * channels + c);
              }
              Store(to + c, sum);
            };
            int c = 0;
            for (; c + 16 <= channels; c += 16) add.template operator()<Vec16>(c);
            for (; c < channels; c++) add.template operator()<float>(c);
          }
        }
      }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise, Depthwise,
                              STRIDED.Attr<bool>("spread").Arg<Array>().Arg<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_kernel_gradient, DepthwiseKernelGradient,
                              STRIDED.Arg<Array>().Arg<Array>().Ret<Array>());
