"""Robust self-training (Uesato et al. 2019, UAT-FT; Carmon et al. 2019), by PGD-AT."""

from gacd.methods.pgd_at import PGDAT


class RST(PGDAT):
    """max_{x' in ball(x)} CE(f(x'), y), y being the teacher's answer where x has no label.

    Where every image has one, this is `pgd-at`.
    """

    needs_teacher = True
