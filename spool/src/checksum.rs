//! CRC32C, the checksum of all that is on disk. A message's content is most of what it runs over, and it stands between
//! a sender and the commit: so by `crc-fast`, which takes what the processor has of carry-less multiplication.

use crc_fast::{CrcAlgorithm, Digest};

pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// Of bytes of which the first have the checksum `crc`, and the rest are `bytes`.
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    // The library keeps the state before the last inversion.
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!crc));
    digest.update(bytes);
    !(digest.get_state() as u32)
}

#[cfg(test)]
mod tests {
    use super::{crc32c, crc32c_append};

    /// Bit by bit, as RFC 9260 appendix A has it.
    fn slow(crc: u32, bytes: &[u8]) -> u32 {
        let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        !bytes.iter().fold(!crc, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
    }

    /// RFC 3720 appendix B.4.
    #[test]
    fn is_the_checksum_of_iscsi() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    /// Other code is taken for other lengths, and for an odd begin.
    #[test]
    fn goes_on_where_it_was_at_every_length() {
        let bytes: Vec<u8> = (0..6_000_u32).map(|place| (place.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for length in (0..700).chain((700..5_900).step_by(97)) {
            let part = &bytes[length % 41..][..length];
            let crc = length as u32 * 7_919;
            assert_eq!(crc32c_append(crc, part), slow(crc, part), "{length} bytes");
            let (first, rest) = part.split_at(length / 3);
            assert_eq!(crc32c_append(crc32c(first), rest), crc32c(part), "{length} bytes");
        }
    }
}
