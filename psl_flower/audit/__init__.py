"""What a curious server learns from what crosses a cut, measured by attacks on a real training."""

from psl_flower.audit.finding import Finding
from psl_flower.extras import extra

with extra("experiments", "an audit"):
    from psl_flower.audit.attacks import ACTIVE, ATTACKS
    from psl_flower.audit.auditing import audit
from psl_flower.audit.result import AuditResult, Case
from psl_flower.audit.target_epsilon import TargetEpsilon

__all__ = ["ACTIVE", "ATTACKS", "AuditResult", "Case", "Finding", "TargetEpsilon", "audit"]
