// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the kernel patches in its own code at boot, by sight. kernel-config/build puts this before apply_alternatives() of
 * arch/x86/kernel/alternative.c; that, apply_retpolines() and apply_returns() ask it about each site first.
 *
 * Linux sends each of fifty thousand sites through its instruction decoder, most of them two or three times, and serializes
 * the processor after each. Nearly all of them are of four kinds that a few bytes tell. Since no other CPU runs yet, one
 * serialization after the last site of a table is enough.
 *
 * Each function returns true when the site is done, false when it is for the decoder.
 */

/* An interrupt may not find half of it. */
static void __init_or_module patch_site(u8 *site, const u8 *bytes, size_t length)
{
	unsigned long flags;

	local_irq_save(flags);
	memcpy(site, bytes, length);
	local_irq_restore(flags);
}

/* Whether this processor is to have the alternative. */
static bool __init_or_module alternative_applies(struct alt_instr *a)
{
	return !boot_cpu_has(a->cpuid) != !(a->flags & ALT_FLAG_NOT);
}

/*
 * Each release of a spinlock is a call through a pointer, with two alternatives: a call of what that points to, and, where no
 * hypervisor wants to know of it, a store of zero to what %rdi points to.
 */
static bool __init_or_module patch_alternative_by_sight(struct alt_instr *a, struct alt_instr *end,
							u8 *site, const u8 *replacement)
{
	static const u8 unlock[] = { 0xc6, 0x07, 0x00 };
	struct alt_instr *next = a + 1;
	void *target;
	s32 distance;
	u8 bytes[6];

	if (system_state != SYSTEM_BOOTING)
		return false;
	/* What comes next replaces all that this would leave, and does not look at it. */
	if (next < end && instr_va(next) == site && alternative_applies(next) &&
	    !(next->flags & ALT_FLAG_DIRECT_CALL))
		return true;
	if (a->instrlen != sizeof(bytes))
		return false;
	/* The call below stays. */
	if (!alternative_applies(a))
		return site[0] == CALL_INSN_OPCODE && site[CALL_INSN_SIZE] == BYTES_NOP1;

	if (a->flags & ALT_FLAG_DIRECT_CALL) {
		if (site[0] != CALL_RIP_REL_OPCODE || site[1] != CALL_RIP_REL_MODRM ||
		    a->replacementlen != CALL_INSN_SIZE || replacement[0] != CALL_INSN_OPCODE)
			return false;
		memcpy(&distance, site + 2, sizeof(distance));
		target = *(void **)(site + sizeof(bytes) + distance);
		if (!target || target == &nop_func)
			return false;
		__text_gen_insn(bytes, CALL_INSN_OPCODE, site, target, CALL_INSN_SIZE);
		bytes[CALL_INSN_SIZE] = BYTES_NOP1;
	} else {
		if (a->replacementlen != sizeof(unlock) || memcmp(replacement, unlock, sizeof(unlock)))
			return false;
		memcpy(bytes, unlock, sizeof(unlock));
		add_nop(bytes + sizeof(unlock), sizeof(bytes) - sizeof(unlock));
	}
	patch_site(site, bytes, sizeof(bytes));
	return true;
}

/*
 * Each indirect call or jump is one of five bytes to a thunk for its register, or of six with a prefix of no effect. It stays
 * where thunks are wanted, and else becomes the call or jump that the thunk stands for. What is rarer than that (a fence
 * before it, thunks that count, thunks at other addresses) is for the decoder.
 */
static bool __init_or_module patch_retpoline_by_sight(u8 *site)
{
	u8 *call = site + (site[0] == 0x2e);
	size_t length = call + CALL_INSN_SIZE - site;
	u8 bytes[CALL_INSN_SIZE + 1];
	retpoline_thunk_t *target;
	int reg, i = 0;
	s32 distance;

	if (system_state != SYSTEM_BOOTING ||
	    (call[0] != CALL_INSN_OPCODE && call[0] != JMP32_INSN_OPCODE) ||
	    cpu_feature_enabled(X86_FEATURE_RETPOLINE_LFENCE) ||
	    cpu_feature_enabled(X86_FEATURE_CALL_DEPTH) ||
	    cpu_feature_enabled(X86_FEATURE_INDIRECT_THUNK_ITS))
		return false;
	memcpy(&distance, call + 1, sizeof(distance));
	target = (void *)(call + CALL_INSN_SIZE + distance);
	for (reg = 0; reg < 16 && target != &__x86_indirect_thunk_array[reg]; reg++)
		;
	if (reg == 16 || reg == 4)
		return false;
	if (cpu_feature_enabled(X86_FEATURE_RETPOLINE))
		return true;

	if (reg >= 8)
		bytes[i++] = 0x41; /* REX.B */
	bytes[i++] = 0xff; /* Group 5: /2 is a call, /4 a jump. */
	bytes[i++] = (call[0] == CALL_INSN_OPCODE ? 0xd0 : 0xe0) + (reg & 7);
	/* Nothing may be executed behind a jump, not even ahead of time. */
	if (call[0] == JMP32_INSN_OPCODE)
		bytes[i++] = INT3_INSN_OPCODE;
	add_nop(bytes + i, length - i);
	patch_site(site, bytes, length);
	return true;
}

/*
 * Every function that the compiler made ends in a jump of five bytes to the return thunk, which becomes a jump to the thunk
 * that this processor wants, or a return.
 */
static bool __init_or_module patch_return_by_sight(u8 *site)
{
	/* What static calls put behind their trampolines, whose returns are not for patching. */
	static const u8 trampoline[] = { 0x0f, 0xb9, 0xcc };
	u8 bytes[JMP32_INSN_SIZE] = { RET_INSN_OPCODE, INT3_INSN_OPCODE, INT3_INSN_OPCODE,
				      INT3_INSN_OPCODE, INT3_INSN_OPCODE };
	s32 distance;

	memcpy(&distance, site + 1, sizeof(distance));
	if (system_state != SYSTEM_BOOTING || site[0] != JMP32_INSN_OPCODE ||
	    site + JMP32_INSN_SIZE + distance != (u8 *)__x86_return_thunk ||
	    !memcmp(site + JMP32_INSN_SIZE, trampoline, sizeof(trampoline)))
		return false;
	if (cpu_wants_rethunk_at(site))
		__text_gen_insn(bytes, JMP32_INSN_OPCODE, site, x86_return_thunk, JMP32_INSN_SIZE);
	patch_site(site, bytes, sizeof(bytes));
	return true;
}

