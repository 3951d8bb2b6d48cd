"""What shared knowledge gives away: attacks on privacy, each by an adversary that sees a run's messages and no more."""
