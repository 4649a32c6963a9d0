// Convolution: every row of the kernel is a product of matrices [pixels, size * channels] x [size * channels, features]
// whose left side lies in the padded image as it is.

#include "convolution_tiles.h"

namespace {

// `count` pixels of `x`, read.
void Read(const Reading& read, const float* x, int count, int channels, float* z) {
  if (!read.any) std::memcpy(z, x, (size_t)count * channels * sizeof(float));
  else
    ForChannels(channels, [=, &read](int c, auto lanes) {
      Normal<Wide> normal = read.At(c);
      for (size_t at = c, end = (size_t)count * channels; at < end; at += channels)
        lanes.Put(z + at, normal(lanes.Get(x + at)));
    });
}

// Mean of `count` pixels and, `channels` behind it, squared deviations from it.
void Moments(const float* y, int count, int channels, float* moments) {
  ForChannels(channels, [=](int c, auto lanes) {
    auto sum = [=](auto term) {
      Wide sums[4] = {};
      const float* at = y + c;
      int p = 0;
      for (; p + 4 <= count; p += 4)
        for (int k = 0; k < 4; k++, at += channels) sums[k] += term(lanes.Get(at));
      for (; p < count; p++, at += channels) sums[0] += term(lanes.Get(at));
      return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    };
    Wide mean = sum([](Wide v) { return v; }) / (float)count;
    lanes.Put(moments + c, mean);
    lanes.Put(moments + channels + c, sum([=](Wide v) { return (v - mean) * (v - mean); }));
  });
}

ffi::Error Forward(ffi::ThreadPool pool, int64_t stride, int64_t reading, Array x, Array mean, Array factor, Array bias,
                   Array kernel, Result y, Result ymean, Result yvar) {
  Shape s(x, y->dimensions(), kernel.dimensions()[0], stride);
  Reading read(reading, s.channels, mean, factor, bias);
  const float *images = x.typed_data(), *weights = kernel.typed_data();
  float* out = y->typed_data();
  Grid grid = ForwardGrid(s);
  int pixels = s.out_height * s.out_width;
  std::vector<float> moments((size_t)s.batch * 2 * s.features);
  float* parts = moments.data();
  ParallelFor(pool, s.batch, [=, &read](int b) FLAT {
    float* z = Scratch(0, s.padded());
    const float* image = images + b * s.image();
    Pad(s.height, s.width, s.channels, s.pad(), z,
        [&](int row, float* to) { Read(read, image + (size_t)row * s.width * s.channels, s.width, s.channels, to); });
    ConvolveGrid(grid, z, weights, out + b * s.out());
    Moments(out + b * s.out(), pixels, s.features, parts + (size_t)b * 2 * s.features);
  });
  MergeMoments(s.batch, [=](int) { return pixels; }, parts, s.features, s.features, ymean->typed_data(),
               yvar->typed_data());
  return ffi::Error::Success();
}

// M taps' gradients, of N vectors of features, over all pixels of an image. `x`: the first tap of the first pixel; `g`:
// of the padded gradient the first pixel inside.
template <class V, int M, int N>
inline void AddTaps(const Shape& s, const float* x, const float* g, float* gradient) {
  constexpr int kLanes = kLanesOf<V>;
  V sum[M][N] = {};
  for (int y = 0; y < s.out_height; y++, g += 2 * s.pad() * s.features) {
    const float* at = x + y * s.stride * s.row();
    for (int p = 0; p < s.out_width; p++, at += s.stride * s.channels, g += s.features) {
      V v[N];
      for (int n = 0; n < N; n++) v[n] = Load<V>(g + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        float value = at[m];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) sum[m][n] += value * v[n];
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      float* to = gradient + (size_t)m * s.features + n * kLanes;
      Store(to, Load<V>(to) + sum[m][n]);
    }
}

// Adds an image's part of the kernel's gradient: `z` and `g` are padded.
void AddKernelGradient(const Shape& s, const float* z, const float* g, float* sums) {
  int taps = s.size * s.channels;
  g += ((size_t)s.pad() * (s.out_width + 2 * s.pad()) + s.pad()) * s.features;
  for (int i = 0; i < s.size; i++)
    ForFeatures(s.features, [&]<class V, int N>(int f) {
      const float* x = z + i * s.row();
      float* to = sums + (size_t)i * taps * s.features + f;
      int t = 0;
      auto blocks = [&]<int M>() {
        for (; t + M <= taps; t += M) AddTaps<V, M, N>(s, x + t, g + f, to + (size_t)t * s.features);
      };
      blocks.template operator()<kAccumulators / N>();
      blocks.template operator()<3>();
      blocks.template operator()<1>();
    });
}

// gx from gz, the gradient of what was read, of `count` pixels; adds to the gradients of factor and bias.
void WriteInputGradient(const Reading& read, const float* x, const float* gz, int count, int channels, float* gx,
                        float* gfactor, float* gbias) {
  ForChannels(channels, [=, &read](int c, auto lanes) {
    Normal<Wide> normal = read.At(c);
    Wide products = {}, sums = {};
    for (size_t at = c, end = (size_t)count * channels; at < end; at += channels) {
      Wide centred = lanes.Get(x + at) - normal.mean, g = normal.Through(lanes.Get(gz + at), centred);
      products += g * centred;
      sums += g;
      lanes.Put(gx + at, g * normal.factor);
    }
    lanes.Put(gfactor + c, lanes.Get(gfactor + c) + products);
    lanes.Put(gbias + c, lanes.Get(gbias + c) + sums);
  });
}

// `gx` null: the kernel's gradient alone.
void Gradients(ffi::ThreadPool& pool, const Shape& s, const Reading& read, const Array& x, const Array& kernel,
               const Array& y, const Array& ymean, const Array& gy, const Array& gmean, const Array& gvar,
               float* gkernel, float* gx, float* gfactor, float* gbias) {
  const float *images = x.typed_data(), *ys = y.typed_data(), *gys = gy.typed_data();
  OutputGradient gradient((double)s.batch * s.out_height * s.out_width, ymean, gmean, gvar);
  std::vector<Phase> phases;
  if (gx) phases = Phases(s, kernel.typed_data());
  // The gradients of the kernel, the factor and the bias lie one behind the other.
  std::vector<float> total(s.kernel() + 2 * s.channels);
  SumOfGroups(pool, total.size(), total.data(), [=, &s, &read, &gradient, &phases](int group, float* sums) FLAT {
    float *z = Scratch(0, s.padded()), *g = Scratch(1, s.padded_out()), *gz = Scratch(2, s.image());
    for (int b = group; b < s.batch; b += kGroups) {
      const float* image = images + b * s.image();
      size_t in_row = (size_t)s.width * s.channels, out_row = (size_t)s.out_width * s.features;
      Pad(s.height, s.width, s.channels, s.pad(), z,
          [&](int row, float* to) { Read(read, image + row * in_row, s.width, s.channels, to); });
      Pad(s.out_height, s.out_width, s.features, s.pad(), g, [&](int row, float* to) {
        size_t first = b * s.out() + row * out_row;
        ForChannels(s.features, [&](int f, auto lanes) {
          Handed<Wide> handed = gradient.At(f);
          for (size_t at = f; at < out_row; at += s.features)
            lanes.Put(to + at, handed(lanes.Get(gys + first + at), lanes.Get(ys + first + at)));
        });
      });
      AddKernelGradient(s, z, g, sums);
      if (!gx) continue;
      for (const Phase& phase : phases) ConvolveGrid(phase.grid, g + phase.from, phase.kernel.data(), gz + phase.to);
      WriteInputGradient(read, image, gz, s.height * s.width, s.channels, gx + b * s.image(), sums + s.kernel(),
                         sums + s.kernel() + s.channels);
    }
  });
  std::copy_n(total.data(), s.kernel(), gkernel);
  if (!gx) return;
  read.Put(&total[s.kernel()], &total[s.kernel() + s.channels], s.channels, gfactor, gbias);
}

ffi::Error Backward(ffi::ThreadPool pool, int64_t stride, int64_t reading, Array x, Array mean, Array factor,
                    Array bias, Array kernel, Array y, Array ymean, Array gy, Array gmean, Array gvar, Result gx,
                    Result gfactor, Result gbias, Result gkernel) {
  Shape s(x, y.dimensions(), kernel.dimensions()[0], stride);
  Reading read(reading, s.channels, mean, factor, bias);
  Gradients(pool, s, read, x, kernel, y, ymean, gy, gmean, gvar, gkernel->typed_data(), gx->typed_data(),
            gfactor->typed_data(), gbias->typed_data());
  return ffi::Error::Success();
}

ffi::Error KernelGradient(ffi::ThreadPool pool, int64_t stride, int64_t reading, Array x, Array mean, Array factor,
                          Array bias, Array kernel, Array y, Array ymean, Array gy, Array gmean, Array gvar,
                          Result gkernel) {
  Shape s(x, y.dimensions(), kernel.dimensions()[0], stride);
  Reading read(reading, s.channels, mean, factor, bias);
  Gradients(pool, s, read, x, kernel, y, ymean, gy, gmean, gvar, gkernel->typed_data(), nullptr, nullptr, nullptr);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_forward, Forward, FORWARD(float));
XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_backward, Backward, BACKWARD(float));
XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_kernel_gradient, KernelGradient, GRADIENTS(float).Ret<Array>());
