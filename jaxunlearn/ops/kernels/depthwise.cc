// Depthwise convolution of an image as it is read through BatchNorm and ReLU. Bound by memory: every array is visited
// once, row by row, and what of it is needed again stays in the cache.

#include <cmath>
#include <limits>

#include "elements.h"

namespace {

constexpr int kLanes = 16;

// Parameters are kept for whole vectors of channels, zeros behind the last channel.
struct Layer {
  int batch, height, width, channels, size, stride, pad, out_height, out_width, wide;
  std::vector<float> mean, factor, bias, kernel;
  float floor;  // what ReLU lifts to

  template <class Dimensions>
  Layer(Dimensions in, int64_t stride, int64_t reading, Array means, Array factors, Array biases, Array kernels)
      : batch(in[0]), height(in[1]), width(in[2]), channels(in[3]), size(kernels.dimensions()[0]), stride(stride),
        pad(size / 2), out_height((height + stride - 1) / stride), out_width((width + stride - 1) / stride),
        wide((channels + kLanes - 1) / kLanes * kLanes), mean(wide), factor(wide, 1.f), bias(wide),
        kernel(Widened(kernels.typed_data(), size * size)),
        floor(reading == 2 ? 0.f : -std::numeric_limits<float>::infinity()) {
    if (reading == 0) return;
    mean = Widened(means.typed_data(), 1);
    factor = Widened(factors.typed_data(), 1);
    bias = Widened(biases.typed_data(), 1);
  }

  std::vector<float> Widened(const float* from, int rows) const {
    std::vector<float> to((size_t)rows * wide);
    for (int r = 0; r < rows; r++) std::copy_n(from + (size_t)r * channels, channels, to.data() + (size_t)r * wide);
    return to;
  }

  size_t row() const { return (size_t)width * channels; }
  size_t out_row() const { return (size_t)out_width * channels; }
};

// Rows of an image of floats, the last `count` of those that were made, with zeros on every side.
struct Ring {
  int count, height;
  size_t row, margin;
  std::vector<float> memory;  // one row more: zeros

  Ring(int count, int height, int width, int pad, int wide)
      : count(count), height(height), row((size_t)(width + 2 * pad) * wide), margin((size_t)pad * wide),
        memory((count + 1) * row) {}

  // The row's first pixel within the image.
  float* operator[](int y) { return memory.data() + (y < 0 || y >= height ? count : y % count) * row + margin; }
};

// What sixteen channels are loaded and stored by: all of them, or the first of them.
template <bool whole>
struct Lanes {
  int count;

  template <class E>
  Vec16 Get(const E* from) const {
    if constexpr (whole) return Load16(from);
    E some[kLanes] = {};
    std::memcpy(some, from, count * sizeof(E));
    return Load16(some);
  }

  template <class E>
  void Put(E* to, Vec16 value) const {
    if constexpr (whole) return Store16(to, value);
    E some[kLanes];
    Store16(some, value);
    std::memcpy(to, some, count * sizeof(E));
  }
};

// sweep(first channel, lanes) for all channels.
template <class F>
void ForChannels(int channels, F sweep) {
  int c = 0;
  for (; c + kLanes <= channels; c += kLanes) sweep(c, Lanes<true>{kLanes});
  if (c < channels) sweep(c, Lanes<false>{channels - c});
}

inline Vec16 Constant(float value) { return value - Vec16{}; }

// NaN stays NaN.
inline Vec16 AtLeast(Vec16 floor, Vec16 value) { return floor > value ? floor : value; }

template <class E>
inline Vec16 AsStored(Vec16 value) {
  if constexpr (sizeof(E) == sizeof(float)) return value;
  E stored[kLanes];
  Store16(stored, value);
  return Load16(stored);
}

template <class E>
void ReadRow(const Layer& s, const E* x, float* z) {
  Vec16 floor = Constant(s.floor);
  for (int p = 0; p < s.width; p++, x += s.channels, z += s.wide)
    ForChannels(s.channels, [&](int c, auto lanes) {
      Vec16 centred = lanes.Get(x + c) - Load<Vec16>(&s.mean[c]);
      Store(z + c, AtLeast(floor, centred * Load<Vec16>(&s.factor[c]) + Load<Vec16>(&s.bias[c])));
    });
}

// Mean and squared deviations from it, per channel, of `count` pixels, which grow by rows: those of a row are sums of
// distances from the mean so far, which lies near enough for float.
struct Statistics {
  int count = 0;
  std::vector<float> mean, squares;

  explicit Statistics(int wide) : mean(wide), squares(wide) {}
};

// A row of the output, and its statistics. K: the kernel's size if it is known, else 0.
template <int K, class E>
void ConvolveRow(const Layer& s, Ring& z, int oy, E* y, Statistics& statistics) {
  const int size = K ? K : s.size;
  std::vector<const float*> rows(size);
  for (int i = 0; i < size; i++) rows[i] = z[oy * s.stride + i - s.pad] - z.margin;
  Vec16 share = Constant(1.f / (statistics.count + s.out_width));
  ForChannels(s.channels, [&](int c, auto lanes) {
    Vec16 taps[K * K + 1];
    for (int n = 0; n < K * K; n++) taps[n] = Load<Vec16>(&s.kernel[(size_t)n * s.wide + c]);
    Vec16 mean = Load<Vec16>(&statistics.mean[c]), sum = {}, squares = {};
    const float* row[K + 1];
    for (int i = 0; i < K; i++) row[i] = rows[i] + c;
    for (int p = 0; p < s.out_width; p++) {
      Vec16 value = {};
      size_t at = (size_t)p * s.stride * s.wide;
#pragma GCC unroll 3
      for (int i = 0; i < size; i++)
#pragma GCC unroll 3
        for (int j = 0; j < size; j++) {
          if constexpr (K) value += Load<Vec16>(row[i] + at + (size_t)j * s.wide) * taps[i * K + j];
          else value += Load<Vec16>(rows[i] + c + at + (size_t)j * s.wide) *
                        Load<Vec16>(&s.kernel[(size_t)(i * size + j) * s.wide + c]);
        }
      lanes.Put(y + (size_t)p * s.channels + c, value);
      Vec16 apart = AsStored<E>(value) - mean;
      sum += apart;
      squares += apart * apart;
    }
    Store(&statistics.mean[c], mean + sum * share);
    Store(&statistics.squares[c], Load<Vec16>(&statistics.squares[c]) + squares - sum * sum * share);
  });
  statistics.count += s.out_width;
}

template <class E>
ffi::Error Forward(ffi::ThreadPool pool, int64_t stride, int64_t reading, ArrayOf<E> x, Array mean, Array factor,
                   Array bias, Array kernel, ResultOf<E> y, Result ymean, Result yvar) {
  Layer s(x.dimensions(), stride, reading, mean, factor, bias, kernel);
  const E* from = Data<const E>(x);
  E* to = Data<E>(*y);
  std::vector<Statistics> parts(kGroups, Statistics(s.wide));
  ParallelFor(pool, kGroups, [&](int group) {
    Statistics& own = parts[group];
    Ring z(s.size, s.height, s.width, s.pad, s.wide);
    for (int b = group; b < s.batch; b += kGroups) {
      const E* image = from + b * s.height * s.row();
      E* out = to + b * s.out_height * s.out_row();
      for (int oy = 0, ready = 0; oy < s.out_height; oy++, out += s.out_row()) {
        for (; ready < std::min(s.height, oy * s.stride - s.pad + s.size); ready++)
          ReadRow(s, image + ready * s.row(), z[ready]);
        auto convolve = [&] {
          if (s.size == 3) ConvolveRow<3>(s, z, oy, out, own);
          else ConvolveRow<0>(s, z, oy, out, own);
        };
        if (own.count == 0) {  // no mean to start from: the first row's
          convolve();
          own.count = 0;
          std::fill(own.squares.begin(), own.squares.end(), 0.f);
        }
        convolve();
      }
    }
  });
  double pixels = (double)s.batch * s.out_height * s.out_width;
  for (int c = 0; c < s.channels; c++) {
    double sum = 0, squares = 0;
    for (const Statistics& part : parts) sum += (double)part.count * part.mean[c];
    double centre = sum / pixels;
    for (const Statistics& part : parts) {
      double apart = part.mean[c] - centre;
      squares += part.squares[c] + part.count * apart * apart;
    }
    ymean->typed_data()[c] = centre;
    yvar->typed_data()[c] = squares / pixels;
  }
  return ffi::Error::Success();
}

// The taps, of those along one side of the kernel, that meet input pixels at `phase` modulo the stride: every
// stride-th. The first meets the output pixel `shift` after the input's divided by the stride, the next the one before.
struct Along {
  int first, count, shift;

  Along(int phase, const Layer& s)
      : first((phase + s.pad) % s.stride), count(std::max(0, (s.size - first + s.stride - 1) / s.stride)),
        shift((phase % s.stride + s.pad - first) / s.stride) {}
};

// Sums over pixels: of every tap's products, for the kernel's gradient, and what gfactor and gbias are.
struct Gradients {
  float *kernel, *factor, *bias;
};

// A row of gx at every stride-th pixel, from `phase` on. R, T: how many rows of g and taps of each meet it, or 0, 0.
// Each value of g that is loaded serves both the gradient of z and the kernel's.
template <int R, int T, class E>
void GradientRow(const Layer& s, Ring& g, int iy, int phase, const E* x, E* gx, const Gradients& gradients) {
  Along down(iy, s), along(phase, s);
  const int rows = R ? R : down.count, taps = T ? T : along.count;
  std::vector<const float*> from(rows);
  for (int r = 0; r < rows; r++) from[r] = g[iy / s.stride + down.shift - r] + (ptrdiff_t)along.shift * s.wide;
  auto tap = [&](int r, int t) {
    return (size_t)((down.first + r * s.stride) * s.size + along.first + t * s.stride) * s.wide;
  };
  Vec16 floor = Constant(s.floor);
  ForChannels(s.channels, [&](int c, auto lanes) {
    Vec16 k[R * T + 1], sum[R * T + 1];
    for (int n = 0; n < R * T; n++) {
      k[n] = Load<Vec16>(&s.kernel[tap(n / T, n % T) + c]);
      sum[n] = Load<Vec16>(gradients.kernel + tap(n / T, n % T) + c);
    }
    const float* row[R + 1];
    for (int r = 0; r < R; r++) row[r] = from[r] + c;
    Vec16 mean = Load<Vec16>(&s.mean[c]), factor = Load<Vec16>(&s.factor[c]), bias = Load<Vec16>(&s.bias[c]);
    Vec16 factors = Load<Vec16>(gradients.factor + c), biases = Load<Vec16>(gradients.bias + c);
    ptrdiff_t at = 0;
    for (int p = phase; p < s.width; p += s.stride, at += s.wide) {
      Vec16 centred = lanes.Get(x + (size_t)p * s.channels + c) - mean;
      Vec16 z = AtLeast(floor, centred * factor + bias), gz = {};
#pragma GCC unroll 3
      for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int t = 0; t < taps; t++) {
          if constexpr (R * T > 0) {
            Vec16 value = Load<Vec16>(row[r] + at - (ptrdiff_t)t * s.wide);
            gz += value * k[r * T + t];
            sum[r * T + t] += value * z;
          } else {
            Vec16 value = Load<Vec16>(from[r] + c + at - (ptrdiff_t)t * s.wide);
            gz += value * Load<Vec16>(&s.kernel[tap(r, t) + c]);
            float* to = gradients.kernel + tap(r, t) + c;
            Store(to, Load<Vec16>(to) + value * z);
          }
        }
      Vec16 kept = z > floor ? gz : Vec16{};
      biases += kept;
      factors += kept * centred;
      lanes.Put(gx + (size_t)p * s.channels + c, kept * factor);
    }
    for (int n = 0; n < R * T; n++) Store(gradients.kernel + tap(n / T, n % T) + c, sum[n]);
    Store(gradients.factor + c, factors);
    Store(gradients.bias + c, biases);
  });
}

template <class E>
ffi::Error Backward(ffi::ThreadPool pool, int64_t stride, int64_t reading, ArrayOf<E> x, Array mean, Array factor,
                    Array bias, Array kernel, ArrayOf<E> y, Array ymean, ArrayOf<E> gy, Array gmean, Array gvar,
                    ResultOf<E> gx, Result gfactor, Result gbias, Result gkernel) {
  Layer s(x.dimensions(), stride, reading, mean, factor, bias, kernel);
  const E *xs = Data<const E>(x), *ys = Data<const E>(y), *gys = Data<const E>(gy);
  E* to = Data<E>(*gx);
  // g = gy + slope * (y - ymean) + constant
  std::vector<float> slope = s.Widened(gvar.typed_data(), 1), constant = s.Widened(gmean.typed_data(), 1);
  std::vector<float> centre = s.Widened(ymean.typed_data(), 1);
  float share = 1 / ((float)s.batch * s.out_height * s.out_width);
  for (int c = 0; c < s.wide; c++) {
    slope[c] *= 2 * share;
    constant[c] *= share;
  }
  auto make = [&](const E* y, const E* gy, float* g) {
    for (int p = 0; p < s.out_width; p++, y += s.channels, gy += s.channels, g += s.wide)
      ForChannels(s.channels, [&](int c, auto lanes) {
        Vec16 apart = lanes.Get(y + c) - Load<Vec16>(&centre[c]);
        Store(g + c, lanes.Get(gy + c) + Load<Vec16>(&constant[c]) + apart * Load<Vec16>(&slope[c]));
      });
  };
  int taps = s.size * s.size;
  std::vector<float> sums((size_t)(taps + 2) * s.wide);
  SumOfGroups(pool, sums.size(), sums.data(), [&](int group, float* own) {
    Gradients gradients{own, own + (size_t)taps * s.wide, own + (size_t)(taps + 1) * s.wide};
    Ring g(s.size, s.out_height, s.out_width, s.pad, s.wide);
    for (int b = group; b < s.batch; b += kGroups) {
      size_t image = b * s.height * s.row(), out = b * s.out_height * s.out_row();
      for (int iy = 0, ready = 0; iy < s.height; iy++) {
        for (; ready < std::min(s.out_height, (iy + s.pad) / s.stride + 1); ready++)
          make(ys + out + ready * s.out_row(), gys + out + ready * s.out_row(), g[ready]);
        const E* seen = xs + image + iy * s.row();
        E* wanted = to + image + iy * s.row();
        for (int phase = 0; phase < std::min(s.stride, s.width); phase++) {
          auto run = [&]<int R, int T>() { GradientRow<R, T>(s, g, iy, phase, seen, wanted, gradients); };
          int rows = Along(iy, s).count, columns = Along(phase, s).count;
          if (rows == 3 && columns == 3) run.template operator()<3, 3>();
          else if (rows == 1 && columns == 1) run.template operator()<1, 1>();
          else if (rows == 1 && columns == 2) run.template operator()<1, 2>();
          else if (rows == 2 && columns == 1) run.template operator()<2, 1>();
          else if (rows == 2 && columns == 2) run.template operator()<2, 2>();
          else run.template operator()<0, 0>();
        }
      }
    }
  });
  for (int n = 0; n < taps; n++)
    std::copy_n(&sums[(size_t)n * s.wide], s.channels, gkernel->typed_data() + (size_t)n * s.channels);
  for (int c = 0; c < s.channels; c++) {
    gfactor->typed_data()[c] = reading ? sums[(size_t)taps * s.wide + c] : 0;
    gbias->typed_data()[c] = reading ? sums[(size_t)(taps + 1) * s.wide + c] : 0;
  }
  return ffi::Error::Success();
}

#define READING STRIDED.Attr<int64_t>("reading")
#define FORWARD(E)                                                                                       \
  READING.Arg<ArrayOf<E>>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Ret<ArrayOf<E>>()        \
      .Ret<Array>().Ret<Array>()
#define BACKWARD(E)                                                                                      \
  READING.Arg<ArrayOf<E>>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<ArrayOf<E>>()        \
      .Arg<Array>().Arg<ArrayOf<E>>().Arg<Array>().Arg<Array>().Ret<ArrayOf<E>>().Ret<Array>()           \
      .Ret<Array>().Ret<Array>()

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_forward, Forward<float>, FORWARD(float));
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_backward, Backward<float>, BACKWARD(float));
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_forward_bf16, Forward<BFloat16>, FORWARD(BFloat16));
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_backward_bf16, Backward<BFloat16>, BACKWARD(BFloat16));
