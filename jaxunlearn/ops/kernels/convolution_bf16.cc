// Convolution of bfloat16 that reads a normalised image and leaves the sums of the next BatchNorm, and its gradients.
//
// Any shape is right, of odd kernels; fast are channels and features that are multiples of 16, and batches of eights.

#include "passes_bf16.h"
#include "taps_bf16.h"

namespace {

// Stores sums, rounded, and merges their mean and squared deviations from it into those of `before` pixels (Chan, Golub
// & LeVeque).
template <bool kWhole, int N>
void StoreAndAdd(Sums<N> sums, Images s, int images, int n, BFloat16* y, float* mean, int& before) {
  float* squares = mean + 16 * s.panels();
  int lanes = kWhole ? 16 : std::min(16, s.channels - 16 * (sums.panel + n)), pixels = sums.pixels() * images;
  Vec16 total[4] = {}, apart[4] = {};
  sums.template Visit<kWhole>(s, images, n, [&total, y, lanes](Vec16& v, int b, size_t at) {
    StoreSome(y + at, v, lanes);
    v = Kept<BFloat16>(v);
    total[b % 4] += v;
  });
  Vec16 own = (total[0] + total[1] + (total[2] + total[3])) / (float)pixels;
  sums.template Visit<kWhole>(s, images, n, [&apart, own](Vec16 v, int b, size_t) {
    apart[b % 4] += (v - own) * (v - own);
  });
  Vec16 change = own - Load<Vec16>(mean);
  float share = (float)pixels / (pixels + before);
  Store(mean, Load<Vec16>(mean) + change * share);
  Vec16 within = apart[0] + apart[1] + (apart[2] + apart[3]);
  Store(squares, Load<Vec16>(squares) + within + change * change * (share * before));
  before += pixels;
}

using HalfArray = ArrayOf<BFloat16>;

ffi::Error Forward(ffi::ThreadPool pool, int64_t stride, int64_t reading, HalfArray x, Array mean, Array factor,
                   Array bias, Array kernel, ResultOf<BFloat16> y, Result ymean, Result yvar) {
  Shape s(x.dimensions(), y->dimensions(), kernel.dimensions()[0], stride);
  Pass pass(s.in, s.out, s.size, s.stride, false);
  Reading read(reading, s.in.channels, mean, factor, bias);
  Bits16* packed = Scratch<Bits16>(0, pass.packed.size());
  Pack(pool, pass.packed, kernel.typed_data(), s.in.channels, s.out.channels, packed);
  const BFloat16* images = Data<const BFloat16>(x);
  BFloat16* results = Data<BFloat16>(*y);
  int lanes = 16 * s.out.panels(), features = s.out.channels;
  std::vector<float> parts((size_t)s.blocks() * 2 * lanes);
  float* moments = parts.data();
  ParallelFor(pool, s.blocks(), [=, &pass, &read](int block) FLAT {
    int count = s.images(block);
    Eight* z = Scratch<Eight>(1, s.in.block(s.pad()));
    const BFloat16* from = images + (size_t)block * kImages * s.in.image();
    BFloat16* to = results + (size_t)block * kImages * s.out.image();
    Arrange(s.in, count, s.pad(), z, nullptr,
            [&](size_t i, int c, int lanes) { return read.At<Vec16>(c)(LoadSome<Vec16>(from + i, lanes)); });
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
  MergeMoments(s.blocks(), [=, &s](int block) { return (double)s.images(block) * s.out.height * s.out.width; }, moments,
               lanes, features, ymean->typed_data(), yvar->typed_data());
  return ffi::Error::Success();
}

// Stores the gradient for x, and adds those of factor and bias to `sums` [factor or bias][channel].
template <bool kWhole, int N>
void StoreInputGradient(Sums<N> gz, Images s, int images, int n, const Reading& read, const BFloat16* x, BFloat16* gx,
                        float* sums) {
  int c = 16 * (gz.panel + n), lanes = kWhole ? 16 : s.channels - c;
  Vec16 factors[2] = {}, biases[2] = {};
  gz.template Visit<kWhole>(
      s, images, n, [&factors, &biases, x, gx, lanes, normal = read.At<Vec16>(c)](Vec16 v, int b, size_t at) {
        Vec16 centred = LoadSome<Vec16>(x + at, lanes) - normal.mean;
        v = normal.Through(v, centred);
        biases[b % 2] += v;
        factors[b % 2] += v * centred;
        StoreSome(gx + at, v * normal.factor, lanes);
      });
  float* below = sums + 16 * s.panels();
  Store(sums, Load<Vec16>(sums) + (factors[0] + factors[1]));
  Store(below, Load<Vec16>(below) + (biases[0] + biases[1]));
}

ffi::Error Backward(ffi::ThreadPool pool, int64_t stride, int64_t reading, HalfArray x, Array mean, Array factor,
                    Array bias, Array kernel, HalfArray y, Array ymean, HalfArray gy, Array gmean, Array gvar,
                    ResultOf<BFloat16> gx, Result gfactor, Result gbias, Result gkernel) {
  Shape s(x.dimensions(), y.dimensions(), kernel.dimensions()[0], stride);
  int channels = s.in.channels, features = s.out.channels, lanes = 16 * s.in.panels();
  Pass pass(s.out, s.in, s.size, s.stride, true);
  Reading read(reading, channels, mean, factor, bias);
  Bits16* packed = Scratch<Bits16>(0, pass.packed.size());
  PackTurned(pool, pass.packed, kernel.typed_data(), channels, features, packed);
  OutputGradient gradient(s.pixels(), ymean, gmean, gvar);
  // Each group of blocks adds up a gradient of its own where that is small beside the images. Else the images are
  // kept for a second visit that divides the kernel.
  bool own = kGroups * s.kernel() <= s.batch * (s.in.image() + s.out.image());
  size_t xs = s.in.panels() * s.in.panel(0), gs = s.out.panels() * s.out.panel(s.pad());
  Bits16* kept = own ? nullptr : Scratch<Bits16>(1, s.blocks() * (xs + gs));
  const BFloat16 *xdata = Data<const BFloat16>(x), *ydata = Data<const BFloat16>(y), *gdata = Data<const BFloat16>(gy);
  BFloat16* out = Data<BFloat16>(*gx);
  float* kernel_gradient = gkernel->typed_data();
  std::vector<float> all(2 * lanes + (own ? s.kernel() : 0));
  SumOfGroups(pool, all.size(), all.data(), [&, own, kept](int group, float* sums) FLAT {
    for (int block = group; block < s.blocks(); block += kGroups) {
      int count = s.images(block);
      Bits16* x2 = own ? Scratch<Bits16>(2, xs + gs) : kept + block * xs;
      Bits16* g2 = own ? x2 + xs : kept + s.blocks() * xs + block * gs;
      Eight* g = Scratch<Eight>(3, s.out.block(s.pad()));
      size_t first = (size_t)block * kImages * s.in.image(), second = (size_t)block * kImages * s.out.image();
      Arrange(s.out, count, s.pad(), g, g2, [&](size_t i, int f, int lanes) {
        return gradient.At<Vec16>(f)(LoadSome<Vec16>(gdata + second + i, lanes),
                                     LoadSome<Vec16>(ydata + second + i, lanes));
      });
      Arrange(s.in, count, 0, nullptr, x2,
              [&](size_t i, int c, int lanes) { return read.At<Vec16>(c)(LoadSome<Vec16>(xdata + first + i, lanes)); });
      pass.Run(g, packed, [&]<int N>(const Sums<N>& gz) {
        for (int n = 0; n < N; n++) {
          int c = 16 * (gz.panel + n);
          auto store = [&]<bool kWhole>() {
            StoreInputGradient<kWhole>(gz, s.in, count, n, read, xdata + first, out + first, sums + c);
          };
          if (count == kImages && c + 16 <= channels) store.template operator()<true>();
          else store.template operator()<false>();
        }
      });
      if (own) AddKernelGradient(s, 0, s.in.panels(), 1, x2, xs, g2, gs, sums + 2 * lanes);
    }
  });
  read.Put(&all[0], &all[lanes], channels, gfactor->typed_data(), gbias->typed_data());
  if (own) {
    std::copy_n(all.data() + 2 * lanes, s.kernel(), kernel_gradient);
  } else {
    ParallelFor(pool, s.in.panels(), [=](int panel) FLAT {
      for (int tap = 0; tap < s.taps(); tap++)
        std::fill_n(kernel_gradient + ((size_t)tap * channels + 16 * panel) * features,
                    std::min(16, channels - 16 * panel) * features, 0.f);
      AddKernelGradient(s, panel, 1, s.blocks(), kept, xs, kept + s.blocks() * xs, gs, kernel_gradient);
    });
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_forward_bf16, Forward, FORWARD(BFloat16));
XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_backward_bf16, Backward, BACKWARD(BFloat16));
