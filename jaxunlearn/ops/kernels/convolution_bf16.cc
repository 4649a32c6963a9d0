// Convolution of bfloat16 that reads a normalised image and leaves the sums of the next BatchNorm, and its gradients.
//
// Any shape is right, of odd kernels; fast are channels and features that are multiples of 16, and batches of eights.

#include <cmath>

#include "passes_bf16.h"
#include "taps_bf16.h"

namespace {

// x as the convolution sees it; read as it is, it is normalised by nothing.
struct Reading {
  std::vector<float> mean, factor, bias;
  float least;

  Reading(int reading, int channels, const Array& mean, const Array& factor, const Array& bias)
      : mean(Whole(mean.typed_data(), channels)), factor(Whole(factor.typed_data(), channels)),
        bias(Whole(bias.typed_data(), channels)), least(reading == 2 ? 0.f : -INFINITY) {
    if (reading != 0) return;
    std::fill(this->mean.begin(), this->mean.end(), 0.f);
    std::fill(this->factor.begin(), this->factor.end(), 1.f);
    std::fill(this->bias.begin(), this->bias.end(), 0.f);
  }

  Vec16 operator()(Vec16 x, int c) const {
    Vec16 v = (x - Load16(&mean[c])) * Load16(&factor[c]) + Load16(&bias[c]), low = least - Vec16{};
    return v < low ? low : v;
  }
};

// Stores sums, rounded, and merges their mean and squared deviations from it into those of `before` pixels (Chan, Golub
// & LeVeque).
template <bool kWhole, int N>
void StoreAndAdd(Sums<N> sums, Images s, int images, int n, BFloat16* y, float* mean, int& before) {
  float* squares = mean + 16 * s.panels();
  int lanes = kWhole ? 16 : std::min(16, s.channels - 16 * (sums.panel + n)), pixels = sums.pixels() * images;
  Vec16 total[4] = {}, apart[4] = {};
  sums.template Visit<kWhole>(s, images, n, [&total, y, lanes](Vec16& v, int b, size_t at) {
    Half16 half = Rounded(v);
    if (kWhole) std::memcpy(y + at, &half, sizeof(half));
    else std::memcpy(y + at, &half, lanes * sizeof(*y));
    v = Widened(half);
    total[b % 4] += v;
  });
  Vec16 own = (total[0] + total[1] + (total[2] + total[3])) / (float)pixels;
  sums.template Visit<kWhole>(s, images, n, [&apart, own](Vec16 v, int b, size_t) {
    apart[b % 4] += (v - own) * (v - own);
  });
  Vec16 change = own - Load16(mean);
  float share = (float)pixels / (pixels + before);
  Store16(mean, Load16(mean) + change * share);
  Vec16 within = apart[0] + apart[1] + (apart[2] + apart[3]);
  Store16(squares, Load16(squares) + within + change * change * (share * before));
  before += pixels;
}

using Half = ArrayOf<BFloat16>;
using HalfResult = ResultOf<BFloat16>;

ffi::Error Forward(ffi::ThreadPool pool, int64_t stride, int64_t reading, Half x, Array mean, Array factor, Array bias,
                   Array kernel, HalfResult y, Result ymean, Result yvar) {
  Shape s(x.dimensions(), y->dimensions(), kernel.dimensions()[0], stride);
  Pass pass(s.in, s.out, s.size, s.stride, false);
  Reading read(reading, s.in.channels, mean, factor, bias);
  Bits16* packed = Scratch<0>(pass.packed.size());
  Pack(pool, pass.packed, kernel.typed_data(), s.in.channels, s.out.channels, packed);
  const BFloat16* images = Data<const BFloat16>(x);
  BFloat16* results = Data<BFloat16>(*y);
  int lanes = 16 * s.out.panels(), features = s.out.channels;
  std::vector<float> parts((size_t)s.blocks() * 2 * lanes);
  float* moments = parts.data();
  ParallelFor(pool, s.blocks(), [=, &pass, &read](int block) {
    int count = s.images(block);
    Eight* z = Scratch<1, Eight>(s.in.block(s.pad()));
    const BFloat16* from = images + (size_t)block * kImages * s.in.image();
    BFloat16* to = results + (size_t)block * kImages * s.out.image();
    Arrange(s.in, count, s.pad(), z, nullptr,
            [&](size_t i, int c, int lanes) { return read(LoadFew(from + i, lanes), c); });
    std::vector<int> before(s.out.panels());
    pass.Run(z, packed, [&]<int N>(const Sums<N>& sums) {
      for (int n = 0; n < N; n++) {
        int panel = sums.panel + n, lanes = features - 16 * panel;
        float* at = moments + ((size_t)block * 2 * s.out.panels() + panel) * 16;
        if (count == kImages && lanes >= 16) StoreAndAdd<true>(sums, s.out, count, n, to, at, before[panel]);
        else StoreAndAdd<false>(sums, s.out, count, n, to, at, before[panel]);
      }
    });
  });
  for (int f = 0; f < features; f++) {
    double sum = 0, squares = 0;
    auto part = [&](int block) { return moments + (size_t)block * 2 * lanes + f; };
    for (int i = 0; i < s.blocks(); i++) sum += (double)s.images(i) * *part(i);
    double centre = sum / s.batch;
    for (int i = 0; i < s.blocks(); i++) {
      double apart = *part(i) - centre;
      squares += part(i)[lanes] + (double)s.images(i) * s.out.height * s.out.width * apart * apart;
    }
    ymean->typed_data()[f] = centre;
    yvar->typed_data()[f] = squares / s.pixels();
  }
  return ffi::Error::Success();
}

// Stores the gradient for x, and adds those of factor and bias to `sums` [factor or bias][channel].
template <bool kWhole, int N>
void StoreInputGradient(Sums<N> gz, Images s, int images, int n, int reading, const Reading& read, const BFloat16* x,
                        BFloat16* gx, float* sums) {
  int c = 16 * (gz.panel + n), lanes = kWhole ? 16 : s.channels - c;
  Vec16 factor = Load16(&read.factor[c]), mean = Load16(&read.mean[c]), bias = Load16(&read.bias[c]);
  Vec16 factors[2] = {}, biases[2] = {};
  auto visit = [&](auto mask) {
    auto store = [&factors, &biases, mask, x, gx, lanes, mean, factor](Vec16 v, int b, size_t at) {
      Vec16 apart = LoadFew(x + at, lanes) - mean;
      v = mask(v, apart);
      biases[b % 2] += v;
      factors[b % 2] += v * apart;
      StoreFew(gx + at, v * factor, lanes);
    };
    gz.template Visit<kWhole>(s, images, n, store);
  };
  if (reading == 2) visit([factor, bias](Vec16 v, Vec16 apart) { return apart * factor + bias > 0 ? v : Vec16{}; });
  else visit([](Vec16 v, Vec16) { return v; });
  if (reading == 0) return;
  Store16(sums, Load16(sums) + (factors[0] + factors[1]));
  sums += 16 * s.panels();
  Store16(sums, Load16(sums) + (biases[0] + biases[1]));
}

ffi::Error Backward(ffi::ThreadPool pool, int64_t stride, int64_t reading, Half x, Array mean, Array factor, Array bias,
                    Array kernel, Half y, Array ymean, Half gy, Array gmean, Array gvar, HalfResult gx, Result gfactor,
                    Result gbias, Result gkernel) {
  Shape s(x.dimensions(), y.dimensions(), kernel.dimensions()[0], stride);
  int channels = s.in.channels, features = s.out.channels, lanes = 16 * s.in.panels();
  Pass pass(s.out, s.in, s.size, s.stride, true);
  Reading read(reading, channels, mean, factor, bias);
  Bits16* packed = Scratch<0>(pass.packed.size());
  PackTurned(pool, pass.packed, kernel.typed_data(), channels, features, packed);
  // g = gy + along * (y - ymean) + constant.
  std::vector<float> along = Whole(gvar.typed_data(), features), constant = Whole(gmean.typed_data(), features),
                     centre = Whole(ymean.typed_data(), features);
  for (float& v : along) v *= 2.f / s.pixels();
  for (float& v : constant) v /= s.pixels();
  // Each group of blocks adds up a gradient of its own where that is small beside the images. Else the images are
  // kept for a second visit that divides the kernel.
  bool own = kGroups * s.kernel() <= s.batch * (s.in.image() + s.out.image());
  size_t xs = s.in.panels() * s.in.panel(0), gs = s.out.panels() * s.out.panel(s.pad());
  Bits16* kept = own ? nullptr : Scratch<1>(s.blocks() * (xs + gs));
  const BFloat16 *xdata = Data<const BFloat16>(x), *ydata = Data<const BFloat16>(y), *gdata = Data<const BFloat16>(gy);
  BFloat16* out = Data<BFloat16>(*gx);
  float* gradient = gkernel->typed_data();
  std::vector<float> all(2 * lanes + (own ? s.kernel() : 0));
  SumOfGroups(pool, all.size(), all.data(), [&, own, kept](int group, float* sums) {
    for (int block = group; block < s.blocks(); block += kGroups) {
      int count = s.images(block);
      Bits16* x2 = own ? Scratch<2>(xs + gs) : kept + block * xs;
      Bits16* g2 = own ? x2 + xs : kept + s.blocks() * xs + block * gs;
      Eight* g = Scratch<3, Eight>(s.out.block(s.pad()));
      size_t first = (size_t)block * kImages * s.in.image(), second = (size_t)block * kImages * s.out.image();
      Arrange(s.out, count, s.pad(), g, g2, [&](size_t i, int f, int lanes) {
        Vec16 apart = LoadFew(ydata + second + i, lanes) - Load16(&centre[f]);
        return LoadFew(gdata + second + i, lanes) + Load16(&along[f]) * apart + Load16(&constant[f]);
      });
      Arrange(s.in, count, 0, nullptr, x2,
              [&](size_t i, int c, int lanes) { return read(LoadFew(xdata + first + i, lanes), c); });
      pass.Run(g, packed, [&]<int N>(const Sums<N>& gz) {
        for (int n = 0; n < N; n++) {
          int c = 16 * (gz.panel + n);
          auto store = [&]<bool kWhole>() {
            StoreInputGradient<kWhole>(gz, s.in, count, n, reading, read, xdata + first, out + first, sums + c);
          };
          if (count == kImages && c + 16 <= channels) store.template operator()<true>();
          else store.template operator()<false>();
        }
      });
      if (own) AddKernelGradient(s, 0, s.in.panels(), 1, x2, xs, g2, gs, sums + 2 * lanes);
    }
  });
  std::copy_n(all.data(), channels, gfactor->typed_data());
  std::copy_n(all.data() + lanes, channels, gbias->typed_data());
  if (own) {
    std::copy_n(all.data() + 2 * lanes, s.kernel(), gradient);
  } else {
    ParallelFor(pool, s.in.panels(), [=](int panel) {
      for (int tap = 0; tap < s.taps(); tap++)
        std::fill_n(gradient + ((size_t)tap * channels + 16 * panel) * features,
                    std::min(16, channels - 16 * panel) * features, 0.f);
      AddKernelGradient(s, panel, 1, s.blocks(), kept, xs, kept + s.blocks() * xs, gs, gradient);
    });
  }
  return ffi::Error::Success();
}

}  // namespace

#define READING STRIDED.Attr<int64_t>("reading").Arg<Half>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_forward_bf16, Forward, READING.Ret<Half>().Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_backward_bf16, Backward,
                              READING.Arg<Half>().Arg<Array>().Arg<Half>().Arg<Array>().Arg<Array>().Ret<Half>()
                                  .Ret<Array>().Ret<Array>().Ret<Array>());
