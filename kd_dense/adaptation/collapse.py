"""Notices a mean teacher that finds hardly anything any more."""

from __future__ import annotations


class CollapseWatch:
    """Says so once, when less than a tenth of what was found at best is left."""

    def __init__(self) -> None:
        self.most, self.said = 0.0, False

    def __call__(self, found: float | None) -> str | None:
        """The sentence, when it is due.

        Args:
            found: pseudo labels per image, or another measure of how many there are; ``None``: nothing is known.
        """
        if found is None:
            return None
        self.most = max(self.most, found)
        if self.said or found >= 0.1 * self.most:
            return None
        self.said = True
        return (
            f'the mean teacher finds {found:.3g} pseudo labels where it once found {self.most:.3g}: it collapses; stop '
            'here, and train with a higher mean_teacher.decay, a lower pseudo_weight or a later start of it'
        )
