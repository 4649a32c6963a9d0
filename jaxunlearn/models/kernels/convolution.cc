// Convolution: every row of the kernel is a product of matrices [pixels, size * channels] x [size * channels, features]
// whose left side lies in the padded image as it is.

#include "common.h"

namespace {

// The widest vector, and how many accumulators of it fit into the registers beside what they are fed with.
#ifdef __AVX512F__
using Wide = Vec16;
constexpr int kAccumulators = 16;
#else
using Wide = Vec8;
constexpr int kAccumulators = 12;
#endif

// Memory of this thread, kept from call to call.
float* Scratch(size_t size) {
  thread_local std::vector<float> memory;
  if (memory.size() < size) memory.resize(size);
  return memory.data();
}

// `image` with `pad` pixels of zeros on every side, in this thread's memory.
const float* Pad(const float* image, int height, int width, int channels, int pad) {
  if (pad == 0) return image;
  float* padded = Scratch((size_t)(height + 2 * pad) * (width + 2 * pad) * channels);
  size_t margin = (size_t)pad * channels, inner = (size_t)width * channels, row = inner + 2 * margin;
  std::fill_n(padded, pad * row, 0.f);
  std::fill_n(padded + (pad + height) * row, pad * row, 0.f);
  for (int y = 0; y < height; y++) {
    float* to = padded + (pad + y) * row;
    std::fill_n(to, margin, 0.f);
    std::memcpy(to + margin, image + y * inner, inner * sizeof(float));
    std::fill_n(to + margin + inner, margin, 0.f);
  }
  return padded;
}

struct Shape {
  int batch, height, width, channels, size, stride, out_height, out_width, features;

  Shape(const Array& x, const ffi::Span<const int64_t>& out, int64_t size, int64_t stride)
      : batch(x.dimensions()[0]), height(x.dimensions()[1]), width(x.dimensions()[2]), channels(x.dimensions()[3]),
        size(size), stride(stride), out_height(out[1]), out_width(out[2]), features(out[3]) {}

  int pad() const { return size / 2; }
  size_t row() const { return (size_t)(width + 2 * pad()) * channels; }  // of the padded image
  size_t image() const { return (size_t)height * width * channels; }
  size_t out() const { return (size_t)out_height * out_width * features; }
  size_t kernel() const { return (size_t)size * size * channels * features; }
};

// P pixels of N vectors of features. `x`: the padded image where the first pixel's window begins.
template <class V, int P, int N>
inline void ConvolveTile(const Shape& s, const float* x, const float* kernel, float* out) {
  constexpr int kLanes = sizeof(V) / sizeof(float);
  int step = s.stride * s.channels, taps = s.size * s.channels;
  V sum[P][N] = {};
  for (int i = 0; i < s.size; i++, x += s.row()) {
    for (int t = 0; t < taps; t++, kernel += s.features) {
      V k[N];
      for (int n = 0; n < N; n++) k[n] = Load<V>(kernel + n * kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) {
        float value = x[p * step + t];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) sum[p][n] += value * k[n];
      }
    }
  }
  for (int p = 0; p < P; p++)
    for (int n = 0; n < N; n++) Store(out + (size_t)p * s.features + n * kLanes, sum[p][n]);
}

template <class V, int N>
void ConvolveColumns(const Shape& s, const float* padded, const float* kernel, float* out) {
  constexpr int kPixels = kAccumulators / N;
  int step = s.stride * s.channels;
  for (int y = 0; y < s.out_height; y++) {
    const float* x = padded + y * s.stride * s.row();
    float* to = out + (size_t)y * s.out_width * s.features;
    int p = 0;
    auto tiles = [&]<int P>() {
      for (; p + P <= s.out_width; p += P)
        ConvolveTile<V, P, N>(s, x + (size_t)p * step, kernel, to + (size_t)p * s.features);
    };
    tiles.template operator()<kPixels>();
    tiles.template operator()<4>();
    tiles.template operator()<1>();
  }
}

// Runs columns<V, N>(first feature) for blocks of N vectors V that cover all features, a multiple of 8.
template <class F>
void ForFeatures(int features, F columns) {
  constexpr int kLanes = sizeof(Wide) / sizeof(float);
  int f = 0;
  for (; f + 2 * kLanes <= features; f += 2 * kLanes) columns.template operator()<Wide, 2>(f);
  for (; f + kLanes <= features; f += kLanes) columns.template operator()<Wide, 1>(f);
  for (; f + 8 <= features; f += 8) columns.template operator()<Vec8, 1>(f);
}

ffi::Error Convolve(ffi::ThreadPool pool, int64_t stride, Array x, Array kernel, Result y) {
  Shape s(x, y->dimensions(), kernel.dimensions()[0], stride);
  const float *images = x.typed_data(), *weights = kernel.typed_data();
  float* out = y->typed_data();
  ParallelFor(pool, s.batch, [=](int b) {
    const float* padded = Pad(images + b * s.image(), s.height, s.width, s.channels, s.pad());
    ForFeatures(s.features, [&]<class V, int N>(int f) {
      ConvolveColumns<V, N>(s, padded, weights + f, out + b * s.out() + f);
    });
  });
  return ffi::Error::Success();
}

// M taps' gradients, of N vectors of features, over all pixels of an image. `x`: the first tap of the first pixel.
template <class V, int M, int N>
inline void AddTaps(const Shape& s, const float* x, const float* g, float* gradient) {
  constexpr int kLanes = sizeof(V) / sizeof(float);
  V sum[M][N] = {};
  for (int y = 0; y < s.out_height; y++) {
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

ffi::Error ConvolutionKernelGradient(ffi::ThreadPool pool, int64_t stride, Array x, Array g, Result gradient) {
  Shape s(x, g.dimensions(), gradient->dimensions()[0], stride);
  const float *images = x.typed_data(), *gs = g.typed_data();
  SumOfGroups(pool, s.kernel(), gradient->typed_data(), [=](int group, float* sums) {
    int taps = s.size * s.channels;
    for (int b = group; b < s.batch; b += kGroups) {
      const float* padded = Pad(images + b * s.image(), s.height, s.width, s.channels, s.pad());
      for (int i = 0; i < s.size; i++)
        ForFeatures(s.features, [&]<class V, int N>(int f) {
          const float *x = padded + i * s.row(), *from = gs + b * s.out() + f;
          float* to = sums + (size_t)i * taps * s.features + f;
          int t = 0;
          auto blocks = [&]<int M>() {
            for (; t + M <= taps; t += M) AddTaps<V, M, N>(s, x + t, from, to + (size_t)t * s.features);
          };
          blocks.template operator()<kAccumulators / N>();
          blocks.template operator()<3>();
          blocks.template operator()<1>();
        });
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(convolve, Convolve, STRIDED.Arg<Array>().Arg<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_kernel_gradient, ConvolutionKernelGradient,
                              STRIDED.Arg<Array>().Arg<Array>().Ret<Array>());
