// Depthwise convolution of an image as it is read through BatchNorm and ReLU, and its gradients.
//
// Bound by memory, which is at its best when it is passed over in order: 73 to 90 GB/s, against 30 to 55 where sixteen
// channels of every pixel come first, then the next. So arrays are read and written row by row, all channels of a pixel
// together; between, rows lie in the cache by blocks of sixteen channels, for which the sums run.

#include <limits>

#include "elements.h"

namespace {

constexpr int kLanes = 16;

struct Layer {
  int batch, height, width, channels, size, stride, pad, out_height, out_width, blocks;
  const float *mean, *factor, *bias, *kernel;
  float floor;  // what ReLU lifts to
  std::vector<float> plain;

  Layer(ffi::Span<const int64_t> in, int64_t stride, int64_t reading, Array mean, Array factor, Array bias,
        Array kernel)
      : batch(in[0]), height(in[1]), width(in[2]), channels(in[3]), size(kernel.dimensions()[0]), stride(stride),
        pad(size / 2), out_height((height + stride - 1) / stride), out_width((width + stride - 1) / stride),
        blocks((channels + kLanes - 1) / kLanes), mean(mean.typed_data()), factor(factor.typed_data()),
        bias(bias.typed_data()), kernel(kernel.typed_data()),
        floor(reading == 2 ? 0.f : -std::numeric_limits<float>::infinity()) {
    if (reading > 0) return;
    plain.assign(2 * channels, 0.f);
    std::fill_n(plain.begin(), channels, 1.f);
    this->factor = plain.data();
    this->mean = this->bias = plain.data() + channels;
  }

  size_t row() const { return (size_t)width * channels; }
  size_t out_row() const { return (size_t)out_width * channels; }
};

// Rows that sums run along together: few pixels would not repay the loading of taps.
inline int Strip(int width, int height) { return std::clamp(32 / width, 1, height); }

// The latest `slots` rows of an image, by blocks of channels, and zeros on every side.
struct Ring {
  int slots, height, pad;
  size_t row, block;
  std::vector<Vec16> memory;

  Ring(const Layer& s, int slots, int height, int width)
      : slots(slots), height(height), pad(s.pad), row(width + 2 * pad), block((slots + 1) * row),
        memory(s.blocks * block) {}

  // Where the row's first pixel lies, of the first block.
  Vec16* operator[](int y) { return memory.data() + (y < 0 || y >= height ? slots : y % slots) * row + pad; }
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
inline void ForChannels(int channels, F sweep) {
  int c = 0;
  for (; c + kLanes <= channels; c += kLanes) sweep(c, Lanes<true>{kLanes});
  if (c < channels) sweep(c, Lanes<false>{channels - c});
}

inline Vec16 Constant(float value) { return value - Vec16{}; }

// NaN stays NaN.
inline Vec16 AtLeast(Vec16 floor, Vec16 value) { return floor > value ? floor : value; }

// Writes past the cache, which would first read what it is to overwrite.
inline void Stream(void* to, const void* from, size_t bytes) {
#ifdef __AVX512F__
  size_t head = std::min<size_t>(bytes, -(uintptr_t)to % 64), at = head;
  std::memcpy(to, from, head);
  for (; at + 64 <= bytes; at += 64)
    _mm512_stream_si512((__m512i*)((char*)to + at), _mm512_loadu_si512((const char*)from + at));
  std::memcpy((char*)to + at, (const char*)from + at, bytes - at);
#else
  std::memcpy(to, from, bytes);
#endif
}

// What is read next, fetched bit by bit while something is calculated.
struct Next {
  const char* from;
  size_t step;

  Next(const void* from, size_t bytes, size_t steps) : from((const char*)from), step(bytes / steps) {}

  Next Piece(size_t begin) const { Next piece = *this; piece.from += begin * step; return piece; }

  void Fetch() {
    for (size_t at = 0; at < step; at += 64) __builtin_prefetch(from + at);
    from += step;
  }
};

template <class E>
void ReadRow(const Layer& s, const E* x, const Ring& ring, Vec16* z) {
  const float *mean = s.mean, *factor = s.factor, *bias = s.bias;
  const size_t block = ring.block;
  const int channels = s.channels;
  Vec16 floor = Constant(s.floor);
  for (int p = s.width; p > 0; p--, x += channels, z++) {
    Vec16* to = z;
    ForChannels(channels, [=, &to](int c, auto lanes) {
      Vec16 centred = lanes.Get(x + c) - lanes.Get(mean + c);
      *to = AtLeast(floor, centred * lanes.Get(factor + c) + lanes.Get(bias + c));
      to += block;
    });
  }
}

// Mean and squared deviations from it of the pixels so far, per channel.
struct Statistics {
  int count = 0;
  std::vector<float> mean, squares;

  explicit Statistics(int channels) : mean(channels), squares(channels) {}
};

// `rows` rows of the output from `oy` on, and their statistics: sums of distances from the mean so far, which lies near
// enough for float. K: the kernel's size if it is known, else 0.
template <int K, class E>
void Convolve(const Layer& s, Ring& z, int oy, int rows, E* y, const Next& next, Statistics& statistics) {
  const int size = K ? K : s.size, stride = s.stride, width = s.out_width, channels = s.channels;
  std::vector<const Vec16*> seen(rows * size);
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < size; i++) seen[r * size + i] = z[(oy + r) * stride + i - s.pad] - s.pad;
  const Vec16* const* from = seen.data();
  const float* kernel = s.kernel;
  float *means = statistics.mean.data(), *deviations = statistics.squares.data();
  const size_t block = z.block;
  Vec16 share = Constant(1.f / (statistics.count + rows * width));
  ForChannels(channels, [=](int c, auto lanes) {
    Next ahead = next.Piece(c / kLanes * rows * width);
    Vec16 taps[K * K + 1];
    for (int n = 0; n < K * K; n++) taps[n] = lanes.Get(kernel + (size_t)n * channels + c);
    Vec16 mean = lanes.Get(means + c), sum = {}, squares = {};
    E* to = y + c;
    for (int r = 0; r < rows; r++) {
      const Vec16* row[K + 1];
      for (int i = 0; i < K; i++) row[i] = from[r * K + i] + c / kLanes * block;
      for (int p = 0, at = 0; p < width; p++, at += stride, to += channels) {
        Vec16 value = {};
        ahead.Fetch();
#pragma GCC unroll 3
        for (int i = 0; i < size; i++)
#pragma GCC unroll 3
          for (int j = 0; j < size; j++) {
            if constexpr (K) value += row[i][at + j] * taps[i * K + j];
            else value += from[r * size + i][c / kLanes * block + at + j] *
                          lanes.Get(kernel + (size_t)(i * size + j) * channels + c);
          }
        lanes.Put(to, value);
        Vec16 apart = lanes.Get(to) - mean;
        sum += apart;
        squares += apart * apart;
      }
    }
    lanes.Put(means + c, mean + sum * share);
    lanes.Put(deviations + c, lanes.Get(deviations + c) + squares - sum * sum * share);
  });
  statistics.count += rows * width;
}

template <class E>
void ForwardImage(const Layer& s, Ring& z, const E* x, E* y, E* scratch, Statistics& own) {
  int ready = 0, strip = Strip(s.out_width, s.out_height);
  auto convolve = [&](int oy, int rows) {
    Next next(x + ready * s.row(), rows * s.stride * s.row() * sizeof(E), s.blocks * rows * s.out_width);
    if (s.size == 3) Convolve<3>(s, z, oy, rows, scratch, next, own);
    else Convolve<0>(s, z, oy, rows, scratch, next, own);
  };
  for (int oy = 0; oy < s.out_height; oy += strip) {
    int rows = std::min(strip, s.out_height - oy);
    for (; ready < std::min(s.height, (oy + rows - 1) * s.stride - s.pad + s.size); ready++)
      ReadRow(s, x + ready * s.row(), z, z[ready]);
    if (own.count == 0) {  // no mean to start from: the first row's
      convolve(0, 1);
      own.count = 0;
      std::fill(own.squares.begin(), own.squares.end(), 0.f);
    }
    convolve(oy, rows);
    Stream(y + oy * s.out_row(), scratch, rows * s.out_row() * sizeof(E));
  }
}

template <class E>
ffi::Error Forward(ffi::ThreadPool pool, int64_t stride, int64_t reading, ArrayOf<E> x, Array mean, Array factor,
                   Array bias, Array kernel, ResultOf<E> y, Result ymean, Result yvar) {
  Layer s(x.dimensions(), stride, reading, mean, factor, bias, kernel);
  const E* from = Data<const E>(x);
  E* to = Data<E>(*y);
  std::vector<Statistics> parts(kGroups, Statistics(s.channels));
  ParallelFor(pool, kGroups, [&](int group) {
    int strip = Strip(s.out_width, s.out_height);
    Ring z(s, strip * s.stride + s.size, s.height, s.width);
    std::vector<E> scratch(strip * s.out_row());
    for (int b = group * s.batch / kGroups; b < (group + 1) * s.batch / kGroups; b++)
      ForwardImage(s, z, from + b * s.height * s.row(), to + b * s.out_height * s.out_row(), scratch.data(),
                   parts[group]);
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

// The taps, of those along one side of the kernel, that meet the input's pixel `at`: every stride-th. The first meets
// the output's pixel `out`, the next the one before.
struct Along {
  int first, count, out;

  Along(int at, const Layer& s)
      : first((at + s.pad) % s.stride), count(std::max(0, (s.size - first + s.stride - 1) / s.stride)),
        out((at + s.pad - first) / s.stride) {}
};

// Sums over pixels: the gradients' of all but the image.
struct Gradients {
  float *kernel, *factor, *bias;
};

// Of `rows` rows of gx from `iy` on every stride-th, and of those every stride-th pixel from `ix` on. R, T: how many
// rows of g and taps of each meet them, or 0, 0. Each value of g that is loaded serves both the gradient of z and the
// kernel's.
template <int R, int T, class E>
void AddGradients(const Layer& s, Ring& g, int iy, int rows, int ix, const E* x, E* gx, const Next* next,
                  const Gradients& gradients) {
  const int width = s.width, channels = s.channels, stride = s.stride;
  const Along down(iy, s), along(ix, s);
  const int lines = R ? R : down.count, taps = T ? T : along.count;
  std::vector<const Vec16*> met;
  for (int r = 0; r < rows; r += stride)
    for (int n = 0; n < lines; n++) met.push_back(g[down.out + r / stride - n] + along.out);
  const Vec16* const* from = met.data();
  const float *means = s.mean, *factors = s.factor, *biases = s.bias, *kernel = s.kernel;
  auto tap = [=, size = s.size](int r, int t) {
    return (size_t)((down.first + r * stride) * size + along.first + t * stride) * channels;
  };
  const size_t block = g.block;
  const Vec16 floor = Constant(s.floor);
  ForChannels(channels, [=](int c, auto lanes) {
    const size_t pieces = c / kLanes * ((rows + stride - 1) / stride) * ((width - ix + stride - 1) / stride);
    Next a0 = next[0].Piece(pieces), a1 = next[1].Piece(pieces), a2 = next[2].Piece(pieces);
    Vec16 k[R * T + 1], sum[R * T + 1];
    for (int n = 0; n < R * T; n++) {
      k[n] = lanes.Get(kernel + tap(n / T, n % T) + c);
      sum[n] = lanes.Get(gradients.kernel + tap(n / T, n % T) + c);
    }
    Vec16 mean = lanes.Get(means + c), factor = lanes.Get(factors + c), bias = lanes.Get(biases + c);
    Vec16 gfactor = lanes.Get(gradients.factor + c), gbias = lanes.Get(gradients.bias + c);
    const Vec16* const* line = from;
    for (int r = 0; r < rows; r += stride, line += lines) {
      const Vec16* row[R + 1];
      for (int n = 0; n < R; n++) row[n] = line[n] + c / kLanes * block;
      const size_t begin = ((size_t)r * width + ix) * channels + c;
      const E* seen = x + begin;
      E* to = gx + begin;
      for (int p = ix, at = 0; p < width; p += stride, at++, seen += stride * channels, to += stride * channels) {
        a0.Fetch(), a1.Fetch(), a2.Fetch();
        Vec16 centred = lanes.Get(seen) - mean;
        Vec16 z = AtLeast(floor, centred * factor + bias), gz = {};
#pragma GCC unroll 3
        for (int n = 0; n < lines; n++)
#pragma GCC unroll 3
          for (int t = 0; t < taps; t++) {
            if constexpr (R * T > 0) {
              Vec16 value = row[n][at - t];
              gz += value * k[n * T + t];
              sum[n * T + t] += value * z;
            } else {
              Vec16 value = line[n][c / kLanes * block + at - t];
              gz += value * lanes.Get(kernel + tap(n, t) + c);
              float* total = gradients.kernel + tap(n, t) + c;
              lanes.Put(total, lanes.Get(total) + value * z);
            }
          }
        Vec16 kept = z > floor ? gz : Vec16{};
        gbias += kept;
        gfactor += kept * centred;
        lanes.Put(to, kept * factor);
      }
    }
    for (int n = 0; n < R * T; n++) lanes.Put(gradients.kernel + tap(n / T, n % T) + c, sum[n]);
    lanes.Put(gradients.factor + c, gfactor);
    lanes.Put(gradients.bias + c, gbias);
  });
}

// g = gy + slope * (y - mean) + constant: what reaches the output by itself and through its statistics.
struct Output {
  const float* mean;
  std::vector<float> slope, constant;

  template <class E>
  void MakeRow(const Layer& s, const E* y, const E* gy, const Ring& ring, Vec16* g) const {
    const float *mean = this->mean, *slope = this->slope.data(), *constant = this->constant.data();
    const size_t block = ring.block;
    const int channels = s.channels;
    for (int p = s.out_width; p > 0; p--, y += channels, gy += channels, g++) {
      Vec16* to = g;
      ForChannels(channels, [=, &to](int c, auto lanes) {
        Vec16 apart = lanes.Get(y + c) - lanes.Get(mean + c);
        *to = lanes.Get(gy + c) + lanes.Get(constant + c) + apart * lanes.Get(slope + c);
        to += block;
      });
    }
  }
};

template <class E>
void BackwardImage(const Layer& s, const Output& output, Ring& g, const E* x, const E* y, const E* gy, E* gx,
                   E* scratch, const Gradients& gradients) {
  int ready = 0, strip = Strip(s.width, s.height);
  for (int iy = 0; iy < s.height; iy += strip) {
    int rows = std::min(strip, s.height - iy);
    for (; ready < std::min(s.out_height, (iy + rows - 1 + s.pad) / s.stride + 1); ready++)
      output.MakeRow(s, y + ready * s.out_row(), gy + ready * s.out_row(), g, g[ready]);
    int phases = std::min(s.stride, rows) * std::min(s.stride, s.width), phase = 0;
    size_t out = ready * s.out_row(), bytes = rows * s.out_row() * sizeof(E) / s.stride;
    for (int i = 0; i < std::min(s.stride, rows); i++)
      for (int j = 0; j < std::min(s.stride, s.width); j++) {
        auto run = [&]<int R, int T>() {
          size_t begin = i * s.row();
          auto part = [&](const E* from, size_t bytes) {
            return Next((const char*)from + bytes / phases * phase, bytes / phases, s.blocks * (size_t)((rows - i + s.stride - 1) / s.stride) * ((s.width - j + s.stride - 1) / s.stride));
          };
          Next next[] = {part(y + out, bytes), part(gy + out, bytes), part(x + (iy + rows) * s.row(), rows * s.row() * sizeof(E))};
          AddGradients<R, T>(s, g, iy + i, rows - i, j, x + iy * s.row() + begin, scratch + begin, next, gradients);
          phase++;
        };
        int lines = Along(iy + i, s).count, taps = Along(j, s).count;
        if (lines == 3 && taps == 3) run.template operator()<3, 3>();
        else if (lines == 1 && taps == 1) run.template operator()<1, 1>();
        else if (lines == 1 && taps == 2) run.template operator()<1, 2>();
        else if (lines == 2 && taps == 1) run.template operator()<2, 1>();
        else if (lines == 2 && taps == 2) run.template operator()<2, 2>();
        else run.template operator()<0, 0>();
      }
    Stream(gx + iy * s.row(), scratch, rows * s.row() * sizeof(E));
  }
}

template <class E>
ffi::Error Backward(ffi::ThreadPool pool, int64_t stride, int64_t reading, ArrayOf<E> x, Array mean, Array factor,
                    Array bias, Array kernel, ArrayOf<E> y, Array ymean, ArrayOf<E> gy, Array gmean, Array gvar,
                    ResultOf<E> gx, Result gfactor, Result gbias, Result gkernel) {
  Layer s(x.dimensions(), stride, reading, mean, factor, bias, kernel);
  const E *xs = Data<const E>(x), *ys = Data<const E>(y), *gys = Data<const E>(gy);
  E* to = Data<E>(*gx);
  Output output{ymean.typed_data(), std::vector<float>(s.channels), std::vector<float>(s.channels)};
  double pixels = (double)s.batch * s.out_height * s.out_width;
  for (int c = 0; c < s.channels; c++) {
    output.slope[c] = 2 * gvar.typed_data()[c] / pixels;
    output.constant[c] = gmean.typed_data()[c] / pixels;
  }
  size_t channels = s.channels, taps = s.size * s.size;
  std::vector<float> sums((taps + 2) * channels);
  SumOfGroups(pool, sums.size(), sums.data(), [&](int group, float* own) {
    Gradients gradients{own, own + taps * channels, own + (taps + 1) * channels};
    int strip = Strip(s.width, s.height);
    Ring g(s, strip + s.size, s.out_height, s.out_width);
    std::vector<E> scratch(strip * s.row());
    for (int b = group * s.batch / kGroups; b < (group + 1) * s.batch / kGroups; b++) {
      size_t image = b * s.height * s.row(), out = b * s.out_height * s.out_row();
      BackwardImage(s, output, g, xs + image, ys + out, gys + out, to + image, scratch.data(), gradients);
    }
  });
  std::copy_n(sums.data(), taps * channels, gkernel->typed_data());
  for (size_t c = 0; c < channels; c++) {
    gfactor->typed_data()[c] = reading ? sums[taps * channels + c] : 0;
    gbias->typed_data()[c] = reading ? sums[(taps + 1) * channels + c] : 0;
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
