// 1x1 convolution that reads a normalised image and leaves the sums of the next BatchNorm: a product of matrices
// [pixels, channels] x [channels, features], in strips of pixels that stay in a core's cache.

#include <memory>

#include "product.h"

namespace {

constexpr int kStrip = 480;  // pixels at most
constexpr int kForwardParts = 64;

struct Shape {
  int height, width, channels, features, stride, out_height, out_width, strip, strips;
  size_t pixels;  // of the output

  template <class X, class Y>
  Shape(const X& x, const Y& y, int64_t stride) : stride(stride) {
    auto in = x.dimensions(), out = y.dimensions();
    height = in[1], width = in[2], channels = in[3], out_height = out[1], out_width = out[2], features = out[3];
    pixels = (size_t)out[0] * out_height * out_width;
    int fit = std::min<size_t>((1 << 16) / (channels + features), pixels / 16) / 24 * 24;
    strip = std::min(std::max(fit, 48), kStrip);
    strips = (pixels + strip - 1) / strip;
  }
  size_t first(int i) const { return (size_t)i * strip; }
  int count(int i) const { return std::min<size_t>(strip, pixels - first(i)); }

  // Where the pixels of the image that strip `i` sees begin.
  void Find(int i, size_t* at) const {
    size_t row = first(i) / out_width, x = first(i) % out_width, y = row % out_height, image = row / out_height;
    for (int p = 0; p < count(i); p++) {
      at[p] = ((image * height + y * stride) * width + x * stride) * channels;
      if (++x < (size_t)out_width) continue;
      x = 0;
      if (++y == (size_t)out_height) y = 0, image++;
    }
  }
};

// Memory of this thread, kept from call to call, that begins at a cache line.
float* Scratch(size_t size) {
  thread_local std::vector<float> memory;
  if (memory.size() < size + 16) memory.resize(size + 16);
  return memory.data() + (-(uintptr_t)memory.data() / sizeof(float) & 15);
}

// Vectors of parameters, zeros behind the last.
template <int K>
struct Parameters {
  int size;
  std::vector<float> all;

  explicit Parameters(int numbers) : size(Padded(numbers)), all((size_t)K * size) {}
  float* operator[](int k) { return all.data() + (size_t)k * size; }
};

template <class E, int kReading>
inline Wide Read(const E* x, const float* reading, int channels, int c, int count) {
  Wide value = LoadSome(x + c, count);
  if (kReading == 0) return value;
  const float* at = reading + c;
  size_t size = Padded(channels);
  value = (value - Load<Wide>(at)) * Load<Wide>(at + size) + Load<Wide>(at + 2 * size);
  return kReading == 2 ? (Wide)(value < 0 ? Wide{} : value) : value;
}

Parameters<3> Reading(int channels, Array mean, Array factor, Array bias) {
  Parameters<3> reading(channels);
  std::copy_n(mean.typed_data(), channels, reading[0]);
  std::copy_n(factor.typed_data(), channels, reading[1]);
  std::copy_n(bias.typed_data(), channels, reading[2]);
  return reading;
}

// Mean and squared deviations of all pixels from those of strips, [strips, 2, padded features] (Chan, Golub & LeVeque).
void Merge(const Shape& s, const float* parts, float* mean, float* variance) {
  int size = Padded(s.features);
  std::vector<double> sums(2 * size);
  double *centre = sums.data(), *squares = centre + size;
  for (int i = 0; i < s.strips; i++)
    for (int f = 0; f < size; f++) centre[f] += s.count(i) * (double)parts[(size_t)2 * i * size + f];
  for (int f = 0; f < size; f++) centre[f] /= s.pixels;
  for (int i = 0; i < s.strips; i++)
    for (int f = 0; f < size; f++) {
      double apart = parts[(size_t)2 * i * size + f] - centre[f];
      squares[f] += parts[(size_t)(2 * i + 1) * size + f] + s.count(i) * apart * apart;
    }
  for (int f = 0; f < s.features; f++) mean[f] = centre[f], variance[f] = squares[f] / s.pixels;
}

template <class E, int kReading>
void Forward(ffi::ThreadPool& pool, const Shape& s, const E* x, const float* reading, const float* kernel, E* y,
             float* mean, float* variance) {
  using S = Stored<E>;
  int channels = s.channels, features = s.features, size = Padded(features);
  std::vector<float> packed =
      Pack<S>(pool, channels, features, [=](int c, int f) { return kernel[(size_t)c * features + f]; });
  std::vector<float> sums((size_t)s.strips * 2 * size);
  const float* panels = packed.data();
  float* parts = sums.data();
  int groups = std::min(s.strips, kForwardParts);
  ParallelFor(pool, groups, [=, &s](int group) {
    int words = Words(channels, kPair<S>), end = s.strips * (group + 1) / groups;
    float *z = Scratch((size_t)s.strip * RowOf(words) + size), *shifts = z + (size_t)s.strip * RowOf(words);
    for (int i = s.strips * group / groups; i < end; i++) {
      int rows = s.count(i);
      size_t at[kStrip];
      s.Find(i, at);
      Fill<S>(rows, channels, z, nullptr, [&](int p, int c, int count) {
        return Read<E, kReading>(x + at[p], reading, channels, c, count);
      });
      Ahead ahead;
      if (i + 1 < end && s.stride == 1) ahead.Add(x + s.first(i + 1) * channels, s.count(i + 1) * channels);
      ahead.Divide((size_t)Tiles(rows, features) * words);
      E* out = y + s.first(i) * features;
      float *totals = parts + (size_t)2 * i * size, *squares = totals + size;
      Product<S>(rows, words, features, z, panels, ahead, [&]<int M, int N>(int p, int f, Wide (&sum)[M][N]) {
#pragma GCC unroll 3
        for (int n = 0; n < N; n++, f += kLanes) {
          // Deviations from what the strip begins with: near enough to its mean for sums of squares to be safe.
          if (p == 0) {
            Wide begin = {};
            for (int m = 0; m < M; m++) begin += sum[m][n];
            Store(shifts + f, begin / (float)M);
          }
          Wide shift = Load<Wide>(shifts + f), total = Load<Wide>(totals + f), square = Load<Wide>(squares + f);
#pragma GCC unroll 12
          for (int m = 0; m < M; m++) {
            Wide apart = StoreSome(out + (size_t)(p + m) * features + f, sum[m][n], features - f) - shift;
            total += apart;
            square += apart * apart;
          }
          Store(totals + f, total);
          Store(squares + f, square);
        }
      });
      for (int f = 0; f < size; f++) {
        squares[f] -= totals[f] * totals[f] / rows;
        totals[f] = shifts[f] + totals[f] / rows;
      }
    }
  });
  Merge(s, parts, mean, variance);
}

template <class E>
struct Gradient {
  const E *x, *y, *gy;
  const float *reading, *kernel;
  E* gx;
  float *gfactor, *gbias, *gkernel;
};

template <class E, int kReading>
void Backward(ffi::ThreadPool& pool, const Shape& s, const Gradient<E>& d, const float* statistics) {
  using S = Stored<E>;
  int channels = s.channels, features = s.features;
  std::vector<float> packed =
      Pack<S>(pool, features, channels, [=, &d](int f, int c) { return d.kernel[(size_t)c * features + f]; });
  const float* panels = packed.data();
  // Few parts where the kernel is large: each adds up a gradient of its own, and the gradients' of bias and factor.
  size_t width = Padded(features), size = channels * width + 2 * Padded(channels);
  int parts = std::min<size_t>(s.strips, std::clamp<size_t>((1 << 20) / size, 8, 64));
  std::vector<float> all(parts * size);
  float* sums = all.data();
  ParallelFor(pool, parts, [=, &s, &d](int part) {
    float *gkernel = sums + part * size, *gbias = gkernel + channels * width, *gfactor = gbias + Padded(channels);
    constexpr bool kPairs = kPair<S> == 2;
    int words = Words(features, kPair<S>);
    // For bfloat16 `g` lies there twice: the kernel's gradient is summed over pixels, the image's over features.
    size_t rows = s.strip, z_size = rows * RowOf(channels), g_size = rows * RowOf(features);
    float *z = Scratch(z_size + 2 * g_size), *g = z + z_size, *along = kPairs ? g + g_size : g;
    int end = s.strips * (part + 1) / parts;
    for (int i = s.strips * part / parts; i < end; i++) {
      int count = s.count(i);
      size_t at[kStrip];
      s.Find(i, at);
      const E *y = d.y + s.first(i) * features, *gy = d.gy + s.first(i) * features;
      Fill<S>(count, channels, nullptr, z,
              [&](int p, int c, int count) {
        return Read<E, kReading>(d.x + at[p], d.reading, channels, c, count);
      });
      Fill<S>(count, features, along, g, [&](int p, int f, int count) {
        size_t from = (size_t)p * features + f;
        const float* of = statistics + f;
        return LoadSome(gy + from, count) + Load<Wide>(of) +
               Load<Wide>(of + width) * (LoadSome(y + from, count) - Load<Wide>(of + 2 * width));
      });
      Ahead ahead;
      if (i + 1 < end) {
        size_t next = s.count(i + 1);
        if (s.stride == 1) ahead.Add(d.x + s.first(i + 1) * channels, next * channels);
        ahead.Add(y + (size_t)count * features, next * features);
        ahead.Add(gy + (size_t)count * features, next * features);
      }
      ahead.Divide((size_t)Tiles(channels, features) * Words(count, kPair<S>) + (size_t)Tiles(count, channels) * words);
      AddTransposedProduct<S>(Words(count, kPair<S>), channels, features, z, g, gkernel, ahead);
      Product<S>(count, words, channels, along, panels, ahead, [&]<int M, int N>(int p, int c, Wide (&sum)[M][N]) {
#pragma GCC unroll 3
        for (int n = 0; n < N; n++, c += kLanes) {
          const float* of = d.reading + c;
          Wide mean = Load<Wide>(of), factor = Load<Wide>(of + Padded(channels));
          Wide bias = Load<Wide>(of + 2 * Padded(channels)), plain = {}, product = {};
#pragma GCC unroll 12
          for (int m = 0; m < M; m++) {
            Wide value = sum[m][n];
            if (kReading) {
              Wide apart = LoadSome(d.x + at[p + m] + c, channels - c) - mean;
              if (kReading == 2) value = apart * factor + bias > 0 ? value : Wide{};
              plain += value;
              product += value * apart;
              value *= factor;
            }
            StoreSome(d.gx + at[p + m] + c, value, channels - c);
          }
          if (kReading) {
            Store(gbias + c, Load<Wide>(gbias + c) + plain);
            Store(gfactor + c, Load<Wide>(gfactor + c) + product);
          }
        }
      });
    }
  });
  auto add = [=](size_t from, int count, float* to) {
    std::fill_n(to, count, 0.f);
    for (int part = 0; part < parts; part++)
      for (int i = 0; i < count; i++) to[i] += sums[part * size + from + i];
  };
  ParallelFor(pool, channels, [=, &d](int c) { add(c * width, features, d.gkernel + (size_t)c * features); });
  add(channels * width, channels, d.gbias);
  add(channels * width + Padded(channels), channels, d.gfactor);
}

// run<reading>().
template <class Run>
void ForReading(int64_t reading, Run run) {
  if (reading == 0) run.template operator()<0>();
  else if (reading == 1) run.template operator()<1>();
  else run.template operator()<2>();
}

template <class E>
ffi::Error PointwiseForward(ffi::ThreadPool pool, int64_t stride, int64_t reading, ArrayOf<E> x, Array mean,
                            Array factor, Array bias, Array kernel, ResultOf<E> y, Result ymean, Result yvar) {
  Shape s(x, *y, stride);
  Parameters<3> normal = Reading(s.channels, mean, factor, bias);
  ForReading(reading, [&]<int kReading>() {
    Forward<E, kReading>(pool, s, Data<E>(x), normal[0], kernel.typed_data(), Data<E>(*y), ymean->typed_data(),
                         yvar->typed_data());
  });
  return ffi::Error::Success();
}

template <class E>
ffi::Error PointwiseBackward(ffi::ThreadPool pool, int64_t stride, int64_t reading, ArrayOf<E> x, Array mean,
                             Array factor, Array bias, Array kernel, ArrayOf<E> y, Array ymean, ArrayOf<E> gy,
                             Array gmean, Array gvar, ResultOf<E> gx, Result gfactor, Result gbias, Result gkernel) {
  Shape s(x, y, stride);
  Parameters<3> normal = Reading(s.channels, mean, factor, bias), statistics(s.features);
  for (int f = 0; f < s.features; f++) {
    statistics[0][f] = gmean.typed_data()[f] / s.pixels;
    statistics[1][f] = 2 * gvar.typed_data()[f] / s.pixels;
    statistics[2][f] = ymean.typed_data()[f];
  }
  Gradient<E> d{Data<E>(x), Data<E>(y), Data<E>(gy), normal[0], kernel.typed_data(), Data<E>(*gx),
                gfactor->typed_data(), gbias->typed_data(), gkernel->typed_data()};
  if (stride > 1) std::fill_n(d.gx, gx->element_count(), E{});
  ForReading(reading, [&]<int kReading>() { Backward<E, kReading>(pool, s, d, statistics[0]); });
  return ffi::Error::Success();
}

}  // namespace

#define READING STRIDED.Attr<int64_t>("reading")
#define FORWARD(E) \
  READING.Arg<ArrayOf<E>>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Ret<ArrayOf<E>>().Ret<Array>().Ret<Array>()
#define BACKWARD(E)                                                                                                  \
  READING.Arg<ArrayOf<E>>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<ArrayOf<E>>().Arg<Array>()       \
      .Arg<ArrayOf<E>>().Arg<Array>().Arg<Array>().Ret<ArrayOf<E>>().Ret<Array>().Ret<Array>().Ret<Array>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(pointwise_forward, PointwiseForward<float>, FORWARD(float));
XLA_FFI_DEFINE_HANDLER_SYMBOL(pointwise_forward_bf16, PointwiseForward<BFloat16>, FORWARD(BFloat16));
XLA_FFI_DEFINE_HANDLER_SYMBOL(pointwise_backward, PointwiseBackward<float>, BACKWARD(float));
XLA_FFI_DEFINE_HANDLER_SYMBOL(pointwise_backward_bf16, PointwiseBackward<BFloat16>, BACKWARD(BFloat16));
