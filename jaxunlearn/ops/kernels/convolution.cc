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

// A grid of windows of `rows` times `taps` floats, and of pixels that their products with a kernel go to. All else is
// distances: between rows of a window, windows side by side and one below the other, pixels likewise.
struct Grid {
  int height, width, features, rows, taps;
  size_t row, along, down, out_along, out_down;
};

// P pixels of N vectors of features.
template <class V, int P, int N>
inline void ConvolveTile(const Grid& s, const float* x, const float* kernel, float* out) {
  constexpr int kLanes = sizeof(V) / sizeof(float);
  V sum[P][N] = {};
  for (int i = 0; i < s.rows; i++, x += s.row) {
    for (int t = 0; t < s.taps; t++, kernel += s.features) {
      V k[N];
      for (int n = 0; n < N; n++) k[n] = Load<V>(kernel + n * kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) {
        float value = x[p * s.along + t];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) sum[p][n] += value * k[n];
      }
    }
  }
  for (int p = 0; p < P; p++)
    for (int n = 0; n < N; n++) Store(out + p * s.out_along + n * kLanes, sum[p][n]);
}

// P pixels of one vector of features where windows of three pixels overlap: every float of the image that is read serves
// three of them. With one vector, the tile above must read one for each multiplication.
template <class V, int P>
inline void ConvolveOverlapping(const Grid& s, const float* x, const float* kernel, float* out) {
  V sum[P] = {};
  size_t channels = s.along, tap = channels * s.features;
  for (int i = 0; i < s.rows; i++, x += s.row, kernel += 2 * tap) {
    for (size_t c = 0; c < channels; c++, kernel += s.features) {
      V k[3] = {Load<V>(kernel), Load<V>(kernel + tap), Load<V>(kernel + 2 * tap)};
#pragma GCC unroll 18
      for (int q = 0; q < P + 2; q++) {
        V value = x[q * channels + c] - V{};
        if (q < P) sum[q] += value * k[0];
        if (q >= 1 && q <= P) sum[q - 1] += value * k[1];
        if (q >= 2) sum[q - 2] += value * k[2];
      }
    }
  }
  for (int p = 0; p < P; p++) Store(out + p * s.out_along, sum[p]);
}

template <class V, int N>
void ConvolveColumns(const Grid& s, const float* x, const float* kernel, float* out) {
  for (int y = 0; y < s.height; y++, x += s.down, out += s.out_down) {
    int p = 0;
    auto tiles = [&]<int P>() {
      for (; p + P <= s.width; p += P) {
        const float* from = x + p * s.along;
        if (N == 1 && P > 4 && s.taps == 3 * (int)s.along)
          ConvolveOverlapping<V, P>(s, from, kernel, out + p * s.out_along);
        else
          ConvolveTile<V, P, N>(s, from, kernel, out + p * s.out_along);
      }
    };
    tiles.template operator()<kAccumulators / N>();
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

void ConvolveGrid(const Grid& grid, const float* x, const float* kernel, float* out) {
  ForFeatures(grid.features, [&]<class V, int N>(int f) { ConvolveColumns<V, N>(grid, x, kernel + f, out + f); });
}

ffi::Error Convolve(ffi::ThreadPool pool, int64_t stride, Array x, Array kernel, Result y) {
  Shape s(x, y->dimensions(), kernel.dimensions()[0], stride);
  Grid grid{s.out_height, s.out_width, s.features, s.size, s.size * s.channels, s.row(),
            (size_t)s.stride * s.channels, s.stride * s.row(), (size_t)s.features, (size_t)s.out_width * s.features};
  const float *images = x.typed_data(), *weights = kernel.typed_data();
  float* out = y->typed_data();
  ParallelFor(pool, s.batch, [=](int b) {
    const float* padded = Pad(images + b * s.image(), s.height, s.width, s.channels, s.pad());
    ConvolveGrid(grid, padded, weights, out + b * s.out());
  });
  return ffi::Error::Success();
}

// The convolution of `x` with its pixels spread out by `stride`, zeros between them. Pixels of the output whose
// coordinates are alike modulo `stride` see the same taps: each such phase is a convolution of `x` as it is.
ffi::Error ConvolveSpread(ffi::ThreadPool pool, int64_t stride, Array x, Array kernel, Result y) {
  Shape s(x, y->dimensions(), kernel.dimensions()[0], stride);
  struct Phase {
    Grid grid;
    size_t from, to;  // of its first window and pixel
    std::vector<float> kernel;
  };
  struct Along {
    int first, count, shift;  // taps, and the pixel of `x` that the first meets, from the output's divided by stride
    Along(int phase, int size, int stride) {
      int before = size - 1 - size / 2;
      first = ((before - phase) % stride + stride) % stride;
      count = (size - first + stride - 1) / stride;
      shift = (phase + first - before) / stride;
    }
  };
  std::vector<Phase> phases;
  int tap = s.channels * s.features;
  for (int a = 0; a < std::min(s.stride, s.out_height); a++)
    for (int b = 0; b < std::min(s.stride, s.out_width); b++) {
      Along down(a, s.size, s.stride), along(b, s.size, s.stride);
      Grid grid{(s.out_height - a + s.stride - 1) / s.stride, (s.out_width - b + s.stride - 1) / s.stride, s.features,
                down.count, along.count * s.channels, s.row(), (size_t)s.channels, s.row(),
                (size_t)s.stride * s.features, (size_t)s.stride * s.out_width * s.features};
      Phase phase{grid, (s.pad() + down.shift) * s.row() + (size_t)(s.pad() + along.shift) * s.channels,
                  ((size_t)a * s.out_width + b) * s.features, {}};
      for (int i = down.first; i < s.size; i += s.stride)
        for (int j = along.first; j < s.size; j += s.stride) {
          const float* from = kernel.typed_data() + (size_t)(i * s.size + j) * tap;
          phase.kernel.insert(phase.kernel.end(), from, from + tap);
        }
      phases.push_back(std::move(phase));
    }
  const float* images = x.typed_data();
  float* out = y->typed_data();
  ParallelFor(pool, s.batch, [=, &phases](int b) {
    const float* padded = Pad(images + b * s.image(), s.height, s.width, s.channels, s.pad());
    for (const Phase& phase : phases)
      ConvolveGrid(phase.grid, padded + phase.from, phase.kernel.data(), out + b * s.out() + phase.to);
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(convolve_spread, ConvolveSpread, STRIDED.Arg<Array>().Arg<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_kernel_gradient, ConvolutionKernelGradient,
                              STRIDED.Arg<Array>().Arg<Array>().Ret<Array>());
