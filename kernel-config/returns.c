// SPDX-License-Identifier: GPL-2.0-only
/*
 * Return sites at boot, by sight. kernel-config/build puts this before apply_returns() of
 * arch/x86/kernel/alternative.c, which asks it about each site first.
 *
 * Every function that the compiler made ends in a jump of five bytes to the return thunk. Linux sends each of these tens of
 * thousands through its instruction decoder and serializes the processor after it. A jump of five bytes is known by its first
 * byte and its target, and since no other CPU runs yet, one serialization after the last is enough.
 *
 * Returns true when the site is done, false when it is for the decoder.
 */
static bool __init_or_module patch_return_by_sight(u8 *site)
{
	/* What static calls put behind their trampolines, whose returns are not for patching. */
	static const u8 trampoline[] = { 0x0f, 0xb9, 0xcc };
	u8 bytes[JMP32_INSN_SIZE] = { RET_INSN_OPCODE, INT3_INSN_OPCODE, INT3_INSN_OPCODE,
				      INT3_INSN_OPCODE, INT3_INSN_OPCODE };
	unsigned long flags;
	s32 distance;

	memcpy(&distance, site + 1, sizeof(distance));
	if (system_state != SYSTEM_BOOTING || site[0] != JMP32_INSN_OPCODE ||
	    site + JMP32_INSN_SIZE + distance != (u8 *)__x86_return_thunk ||
	    !memcmp(site + JMP32_INSN_SIZE, trampoline, sizeof(trampoline)))
		return false;
	if (cpu_wants_rethunk_at(site))
		__text_gen_insn(bytes, JMP32_INSN_OPCODE, site, x86_return_thunk, JMP32_INSN_SIZE);

	/* An interrupt may not find half of it. */
	local_irq_save(flags);
	memcpy(site, bytes, JMP32_INSN_SIZE);
	local_irq_restore(flags);
	return true;
}

