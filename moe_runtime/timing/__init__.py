"""Where the time of a rank's steps goes: attention, experts, dispatch, combine, waiting for others, the rest."""
