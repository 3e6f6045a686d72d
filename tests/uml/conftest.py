"""What is below guest_tests/ runs in a guest only: it makes network namespaces and NFS servers that the machine cannot have."""

import os

collect_ignore = [] if os.environ.get("TATAMI_GUEST") else ["guest_tests"]
