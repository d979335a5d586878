"""Guided Adversarial Contrastive Distillation: small robust students from robust teachers.

| what for | import from | the main names |
|---|---|---|
| the objective | gacd.losses.contrastive | gacd_loss, info_nce, nce, crd_nce |
| mutual information | gacd.losses.information | info_nce_bound, nce_bound |
| rivals' losses | gacd.losses.soft_labels | kd, ard, rslad, iad, adaad, igdm, feature_regression |
| without a teacher | gacd.losses.robust | trades, mart |
| the teacher's features | gacd.anchors | AnchorBank |
| CRD's memories | gacd.memory | MomentumMemory, Normaliser, OtherClasses |
| attacks | gacd.attacks.pgd | pgd, fgsm |
| what they maximise | gacd.attacks.objectives | cross_entropy, feature_transport, PerImage |
| within what | gacd.attacks.threat | ThreatModel |
| networks | gacd.models | create_model, register_model |
| one of your own | gacd.models.adapted | Adapted |
| files of them | gacd.models.checkpoints | load_model, load_weights, save_model |
| their mode in an attack | gacd.models.modes | evaluating |
| data | gacd.data.load | load_splits |
| images of your own | gacd.data.dataset | ArrayDataset |
| batches of an epoch | gacd.data.batches | iterate |
| how robust | gacd.evaluation.robust | evaluate, epsilon_curve |
| AutoAttack alone | gacd.evaluation.autoattack | autoattack |
| more than another? | gacd.evaluation.outcomes | Evaluation, compare |
| or masked? | gacd.evaluation.diagnosis | diagnose |
| a last layer | gacd.linear | fit_head |
| for other classes | gacd.evaluation.transfer | transfer |
| methods | gacd.methods | create_method, register_method, Term |
| training them | gacd.training.loop | fit, Plan |
"""

__version__ = "0.1.0"
