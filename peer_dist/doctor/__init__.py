"""``peer-dist doctor``: whether these ranks, on these machines, can train, found out in seconds before a run."""

from peer_dist.doctor.examination import Finding, Report, examine

__all__ = ["Finding", "Report", "examine"]
