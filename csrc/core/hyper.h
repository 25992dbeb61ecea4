// The hyper-parameters of a step that may change from step to step, in the order in which they lie in the
// `hyper` tensor (float64 [kHyperCount]) of the step ops. HYPER of quantopt/rules.py is the same list; a test
// compares them. AskewSGD without a latent is as printed where `bound` is infinite; else it clamps.
#pragma once

namespace quantopt {

#define QUANTOPT_HYPER(FIELD)                                                        \
  FIELD(lr)           /* eta (gamma of the splitting) */                             \
  FIELD(momentum)     /* beta; beta1 of Adam */                                      \
  FIELD(beta2)        /* Adam */                                                     \
  FIELD(adam_eps)     /* Adam */                                                     \
  FIELD(weight_decay) /* wd */                                                       \
  FIELD(epsilon)      /* AskewSGD: e in [0, 1] */                                    \
  FIELD(rate)         /* AskewSGD: r per step; infinite with a latent: projection */ \
  FIELD(cap)          /* AskewSGD: bound of the restoring step, in units of t */     \
  FIELD(bound)        /* of the latent, in units of hi or of its scale; below */     \
  FIELD(kappa)        /* STAM, BinaryRelax: relaxation weight; infinite: hard */     \
  FIELD(lam)          /* STAM alternating: pull of the latent towards its level */   \
  FIELD(threshold)    /* ProxQuant: lam_k = lr reg k; infinite: hard */

struct Hyper {
#define QUANTOPT_FIELD(name) double name;
  QUANTOPT_HYPER(QUANTOPT_FIELD)
#undef QUANTOPT_FIELD
};

#define QUANTOPT_NAME(name) #name,
inline constexpr const char* kHyperNames[] = {QUANTOPT_HYPER(QUANTOPT_NAME)};
#undef QUANTOPT_NAME
inline constexpr int kHyperCount = sizeof(Hyper) / sizeof(double);

}  // namespace quantopt
