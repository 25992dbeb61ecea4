// The numbers of a step that may change from step to step, in the order in which they lie in the
// `hyper` tensor (float64 [kHyperCount]) of the step ops; quantopt/ops/step.py writes it.
#pragma once

namespace quantopt {

struct Hyper {
  double lr;            // eta (gamma of the splitting)
  double momentum;      // beta; beta1 of Adam
  double beta2;         // Adam
  double adam_eps;      // Adam
  double weight_decay;  // wd
  double epsilon;       // AskewSGD: e in [0, 1]
  double rate;          // AskewSGD: r per step; infinite with memory = exact projection
  double cap;           // AskewSGD: bound of the restoring step, in units of t
  double bound;         // latent bound: ub (memory, of hi) or clip (BinaryConnect, of sigma)
  double kappa;         // STAM, BinaryRelax: relaxation weight; infinite = hard
  double lam;           // STAM alternating: pull of the latent towards its level
  double threshold;     // ProxQuant: lam_k = lr * reg * k; infinite = hard
};
inline constexpr int kHyperCount = sizeof(Hyper) / sizeof(double);

}  // namespace quantopt
