# SPDX-License-Identifier: GPL-2.0-or-later
# The devices of x86_64-softmmu but the floppy controller, which a PC would always have: a guest
# that loads a driver for it loses interrupt 6.

include default.mak

CONFIG_FDC_ISA=n
