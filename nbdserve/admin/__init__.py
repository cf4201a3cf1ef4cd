"""The admin socket: QMP, the protocol of QEMU's monitor (https://www.qemu.org/docs/master/interop/qmp-spec.html)."""
