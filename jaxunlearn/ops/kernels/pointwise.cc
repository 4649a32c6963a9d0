// 1x1 convolution that reads a normalised image and leaves the sums of the next BatchNorm: a product of matrices
// [pixels, channels] x [channels, features], in strips of pixels that stay in a core's cache.

#include "images.h"
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

template <class E>
ffi::Error Forward(ffi::ThreadPool pool, int64_t stride, int64_t reading, ArrayOf<E> x, Array mean, Array factor,
                   Array bias, Array kernel, ResultOf<E> y, Result ymean, Result yvar) {
  using S = Stored<E>;
  Shape s(x, *y, stride);
  int channels = s.channels, features = s.features, size = Whole(features);
  Reading read(reading, channels, mean, factor, bias);
  const E* from = Data<E>(x);
  E* to = Data<E>(*y);
  const float* weights = kernel.typed_data();
  std::vector<float> packed =
      Pack<S>(pool, channels, features, [=](int c, int f) { return weights[(size_t)c * features + f]; });
  std::vector<float> moments((size_t)s.strips * 2 * size);
  int groups = std::min(s.strips, kForwardParts);
  ParallelFor(pool, groups, [=, &s, &read, panels = packed.data(), parts = moments.data()](int group) FLAT {
    int words = Words(channels, kPair<S>), end = s.strips * (group + 1) / groups;
    float *z = Scratch(0, (size_t)s.strip * RowOf(words)), *shifts = Scratch(1, size);
    for (int i = s.strips * group / groups; i < end; i++) {
      int rows = s.count(i);
      size_t at[kStrip];
      s.Find(i, at);
      Fill<S>(rows, channels, z, nullptr, [&](int c, int count) {
        return [&at, from, c, count, normal = read.At(c)](int p) {
          return normal(LoadSome<Wide>(from + at[p] + c, count));
        };
      });
      Ahead ahead;
      if (i + 1 < end && s.stride == 1) ahead.Add(from + s.first(i + 1) * channels, s.count(i + 1) * channels);
      ahead.Divide((size_t)Tiles(rows, features) * words);
      E* out = to + s.first(i) * features;
      float *totals = parts + (size_t)2 * i * size, *squares = totals + size;
      Product<S>(rows, words, features, z, panels, ahead, [&]<int M, int N>(int p, int f, Wide (&sum)[M][N]) {
#pragma GCC unroll 3
        for (int n = 0; n < N; n++, f += kLanes) {
          // Deviations from what the strip begins with: near enough to its mean for sums of squares to be safe.
          if (p == 0) {
            Wide begin = {};
            for (int m = 0; m < M; m++) begin += sum[m][n];
            Store(shifts + f, Kept<E>(begin / (float)M));
          }
          Wide shift = Load<Wide>(shifts + f), total = Load<Wide>(totals + f), square = Load<Wide>(squares + f);
#pragma GCC unroll 12
          for (int m = 0; m < M; m++) {
            StoreSome(out + (size_t)(p + m) * features + f, sum[m][n], features - f);
            Wide apart = Kept<E>(sum[m][n]) - shift;
            total += apart;
            square += apart * apart;
          }
          Store(totals + f, total);
          Store(squares + f, square);
        }
      });
      for (int f = 0; f < size; f++) Centre(shifts[f], rows, totals[f], squares[f]);
    }
  });
  MergeMoments(s.strips, [&](int i) { return s.count(i); }, moments.data(), size, features, ymean->typed_data(),
               yvar->typed_data());
  return ffi::Error::Success();
}

template <class E>
ffi::Error Backward(ffi::ThreadPool pool, int64_t stride, int64_t reading, ArrayOf<E> x, Array mean, Array factor,
                    Array bias, Array kernel, ArrayOf<E> y, Array ymean, ArrayOf<E> gy, Array gmean, Array gvar,
                    ResultOf<E> gx, Result gfactor, Result gbias, Result gkernel) {
  using S = Stored<E>;
  Shape s(x, y, stride);
  int channels = s.channels, features = s.features;
  Reading read(reading, channels, mean, factor, bias);
  OutputGradient gradient(s.pixels, ymean, gmean, gvar);
  const E *xs = Data<E>(x), *ys = Data<E>(y), *gys = Data<E>(gy);
  const float* weights = kernel.typed_data();
  E* out = Data<E>(*gx);
  if (stride > 1) std::fill_n(out, gx->element_count(), E{});
  std::vector<float> packed =
      Pack<S>(pool, features, channels, [=](int f, int c) { return weights[(size_t)c * features + f]; });
  // Few parts where the kernel is large: each adds up a gradient of its own, and the gradients' of bias and factor.
  size_t width = Whole(features), size = channels * width + 2 * Whole(channels);
  int parts = std::min<size_t>(s.strips, std::clamp<size_t>((1 << 20) / size, 8, 64));
  std::vector<float> sums(parts * size);
  ParallelFor(pool, parts, [=, &s, &read, &gradient, panels = packed.data(), sums = sums.data()](int part) FLAT {
    float *gkernel = sums + part * size, *gbias = gkernel + channels * width, *gfactor = gbias + Whole(channels);
    int words = Words(features, kPair<S>);
    // For bfloat16 `g` lies there twice: the kernel's gradient is summed over pixels, the image's over features.
    size_t z_size = s.strip * RowOf(channels), g_size = s.strip * RowOf(features);
    float *z = Scratch(0, z_size + 2 * g_size), *g = z + z_size, *along = kPair<S> == 2 ? g + g_size : g;
    int end = s.strips * (part + 1) / parts;
    for (int i = s.strips * part / parts; i < end; i++) {
      int count = s.count(i);
      size_t at[kStrip];
      s.Find(i, at);
      const E *y = ys + s.first(i) * features, *gy = gys + s.first(i) * features;
      Fill<S>(count, channels, nullptr, z, [&](int c, int some) {
        return [&at, xs, c, some, normal = read.At(c)](int p) {
          return normal(LoadSome<Wide>(xs + at[p] + c, some));
        };
      });
      Fill<S>(count, features, along, g, [&](int f, int some) {
        return [y, gy, f, some, features, handed = gradient.At(f)](int p) {
          size_t from = (size_t)p * features + f;
          return handed(LoadSome<Wide>(gy + from, some), LoadSome<Wide>(y + from, some));
        };
      });
      Ahead ahead;
      if (i + 1 < end) {
        size_t next = s.count(i + 1);
        if (s.stride == 1) ahead.Add(xs + s.first(i + 1) * channels, next * channels);
        ahead.Add(y + (size_t)count * features, next * features);
        ahead.Add(gy + (size_t)count * features, next * features);
      }
      ahead.Divide((size_t)Tiles(channels, features) * Words(count, kPair<S>) + (size_t)Tiles(count, channels) * words);
      AddTransposedProduct<S>(Words(count, kPair<S>), channels, features, z, g, gkernel, ahead);
      auto finish = [&]<int M, int N>(int p, int c, Wide(&sum)[M][N]) {
#pragma GCC unroll 3
        for (int n = 0; n < N; n++, c += kLanes) {
          if (!read.any) {
#pragma GCC unroll 12
            for (int m = 0; m < M; m++) StoreSome(out + at[p + m] + c, sum[m][n], channels - c);
            continue;
          }
          Normal<Wide> normal = read.At(c);
          Wide plain = {}, product = {};
#pragma GCC unroll 12
          for (int m = 0; m < M; m++) {
            Wide centred = LoadSome<Wide>(xs + at[p + m] + c, channels - c) - normal.mean;
            Wide value = normal.Through(sum[m][n], centred);
            plain += value;
            product += value * centred;
            StoreSome(out + at[p + m] + c, value * normal.factor, channels - c);
          }
          Store(gbias + c, Load<Wide>(gbias + c) + plain);
          Store(gfactor + c, Load<Wide>(gfactor + c) + product);
        }
      };
      Product<S>(count, words, channels, along, panels, ahead, finish);
    }
  });
  auto add = [&](size_t from, int count, float* to) {
    std::fill_n(to, count, 0.f);
    for (int part = 0; part < parts; part++)
      for (int i = 0; i < count; i++) to[i] += sums[part * size + from + i];
  };
  ParallelFor(pool, channels,
              [&](int c) { add(c * width, features, gkernel->typed_data() + (size_t)c * features); });
  add(channels * width, channels, gbias->typed_data());
  add(channels * width + Whole(channels), channels, gfactor->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(pointwise_forward, Forward<float>, FORWARD(float));
XLA_FFI_DEFINE_HANDLER_SYMBOL(pointwise_forward_bf16, Forward<BFloat16>, FORWARD(BFloat16));
XLA_FFI_DEFINE_HANDLER_SYMBOL(pointwise_backward, Backward<float>, BACKWARD(float));
XLA_FFI_DEFINE_HANDLER_SYMBOL(pointwise_backward_bf16, Backward<BFloat16>, BACKWARD(BFloat16));
