/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Entry of the bare-metal guest: a multiboot kernel in 32-bit protected mode without paging, and
 * its interrupt stubs.
 */

#define MAGIC 0x1badb002

	.section .text.boot, "ax"
	.balign 4
	.long MAGIC, 0, -MAGIC

	.global start
start:
	cli
	movl	$stack_top, %esp
	lgdt	gdt_register
	ljmp	$0x08, $1f
1:	movl	$0x10, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %fs
	movl	%eax, %gs
	movl	%eax, %ss
	pushl	%ebx			/* multiboot information */
	call	guest_main
2:	cli
	hlt
	jmp	2b

/* One stub per vector, 16 bytes each. All leave vector and error code on the stack. */
	.balign 16
	.global stubs
stubs:
	.set	vector, 0
	.rept	256
	.balign	16
	/* 8, 10 to 14, 17, 21: the CPU has pushed an error code */
	.if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
	pushl	$0
	.endif
	pushl	$vector
	jmp	common
	.set	vector, vector + 1
	.endr

common:
	pushal
	cld
	pushl	%esp			/* struct frame * */
	call	guest_interrupt
	addl	$4, %esp
	popal
	addl	$8, %esp
	iret

/*
 * Where the second processor starts, in real mode: a copy of this is at TRAMPOLINE, below 1 MiB.
 */
	.equ	TRAMPOLINE, 0x8000
	.code16
	.global trampoline, trampoline_end
trampoline:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	lgdtl	TRAMPOLINE + (1f - trampoline)
	movl	%cr0, %eax
	orl	$1, %eax
	movl	%eax, %cr0
	ljmpl	$0x08, $second
	.balign 8
1:	.word	gdt_register - gdt - 1
	.long	gdt
trampoline_end:

	.code32
second:
	movl	$0x10, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %fs
	movl	%eax, %gs
	movl	%eax, %ss
	movl	$second_stack_top, %esp
	call	second_main
2:	cli
	hlt
	jmp	2b

	.section .rodata
	.balign 8
gdt:	.quad	0
	.quad	0x00cf9a000000ffff	/* 0x08: flat code */
	.quad	0x00cf92000000ffff	/* 0x10: flat data */
gdt_register:
	.word	. - gdt - 1
	.long	gdt

	.bss
	.balign 16
	.skip	16384
stack_top:
	.skip	4096
second_stack_top:

	.section .note.GNU-stack, "", @progbits
