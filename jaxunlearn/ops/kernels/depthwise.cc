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

constexpr int kRun = 4;

// The same for 3x3 and a run of pixels side by side, of stride 1 and away from the border: what is read serves three of
// them. row[i]: where the first window's row i begins, null where it is outside. kernel[i]: its three taps.
void SumOfRun(const float* const row[3], const float* const kernel[3], ptrdiff_t tap, int channels, float* to) {
  for (int c = 0; c + 16 <= channels; c += 16) {
    Vec16 sum[kRun] = {};
    for (int i = 0; i < 3; i++) {
      if (!row[i]) continue;
      const float* k = kernel[i] + c;
      Vec16 first = Load<Vec16>(k), second = Load<Vec16>(k + tap), third = Load<Vec16>(k + 2 * tap);
#pragma GCC unroll 6
      for (int q = 0; q < kRun + 2; q++) {
        Vec16 value = Load<Vec16>(row[i] + (size_t)q * channels + c);
        if (q < kRun) sum[q] += value * first;
        if (q >= 1 && q <= kRun) sum[q - 1] += value * second;
        if (q >= 2) sum[q - 2] += value * third;
      }
    }
    for (int p = 0; p < kRun; p++) Store(to + (size_t)p * channels + c, sum[p]);
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
    bool runs = size == 3 && stride == 1 && channels % 16 == 0;
    for (int oy = 0; oy < out_height; oy++) {
      const float *rows[3], *kernels[3];
      for (int i = 0; i < 3 && runs; i++) {
        int iy = oy + i - 1;
        rows[i] = iy < 0 || iy >= height ? nullptr : image + (size_t)iy * width * channels;
        kernels[i] = weights + (size_t)(spread ? 8 - 3 * i : 3 * i) * channels;
      }
      for (int ox = 0; ox < out_width; ox++, pixel += channels) {
        if (runs && ox > 0 && ox + kRun < out_width) {
          const float* from[3];
          for (int i = 0; i < 3; i++) from[i] = rows[i] ? rows[i] + (size_t)(ox - 1) * channels : nullptr;
          SumOfRun(from, kernels, spread ? -channels : channels, channels, pixel);
          ox += kRun - 1;
          pixel += (size_t)(kRun - 1) * channels;
          continue;
        }
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
    }
  });
  return ffi::Error::Success();
}

// gradient[j] += sum over p < count of x[p * step + j pixels] * g[p], j < 3.
void AddThree(const float* x, size_t step, const float* g, int count, int channels, float* gradient) {
  for (int c = 0; c < channels; c += 16) {
    Vec16 sum[3];
    for (int j = 0; j < 3; j++) sum[j] = Load<Vec16>(gradient + (size_t)j * channels + c);
    for (int p = 0; p < count; p++) {
      const float* seen = x + p * step + c;
      Vec16 value = Load<Vec16>(g + (size_t)p * channels + c);
      for (int j = 0; j < 3; j++) sum[j] += value * Load<Vec16>(seen + (size_t)j * channels);
    }
    for (int j = 0; j < 3; j++) Store(gradient + (size_t)j * channels + c, sum[j]);
  }
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
          float* to = sums + (size_t)i * size * channels;
          // Output pixels whose windows' columns j lie all in the image: what is read of `g` serves three columns.
          int inner = (pad + (int)stride - 1) / (int)stride, outer = (width - 1 - pad) / (int)stride;
          bool whole = size == 3 && channels % 16 == 0 && width > pad && inner <= outer;
          if (whole) AddThree(row + (inner * stride - 1) * channels, stride * channels, from + inner * channels,
                              outer - inner + 1, channels, to);
          for (int j = 0; j < size; j++) {
            if (width - 1 + pad - j < 0) continue;
            int first = std::max(0, (pad - j + (int)stride - 1) / (int)stride);
            int last = std::min(out_width - 1, (width - 1 + pad - j) / (int)stride);
            for (int ox = first; ox <= last; ox++) {
              if (whole && ox == inner) ox = outer + 1;
              if (ox > last) break;
              const float *seen = row + (size_t)(ox * stride + j - pad) * channels, *g = from + (size_t)ox * channels;
#pragma GCC ivdep
              for (int c = 0; c < channels; c++) to[(size_t)j * channels + c] += seen[c] * g[c];
            }
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
