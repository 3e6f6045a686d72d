"""Only the code in here touches the kernel or starts a process."""
